// One cluster of thread blocks on the CPU: a fiber for each thread, in an order drawn at random, and a shared memory that
// knows what has been written, by whom, and whether it has arrived. It stands in for csrc/cuda/ptx.cuh (PERP_EMULATOR),
// so what runs on it is the source of the kernels, entry points and all.
//
// It is as unkind as the PTX manual allows. Copies land as late as they may, bulk copies at a random moment; products of a
// warp group happen when they are waited for. What the manual leaves undefined is an error: reading what has not arrived
// or was never written, overwriting what a product has yet to read, products of data that no proxy fence has passed,
// misaligned or stray addresses, metadata that is no pair, a barrier with too many arrivals. All threads waiting for
// each other is an error too.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& what) { throw Failure(what); }

// What a chunk of 16 bytes of shared memory holds.
enum class Chunk : std::uint8_t { nothing, on_its_way, unfenced, settled };

struct Copy {
  std::uint32_t to;
  const void* from;  // null: zeros
};

struct Product {  // of a warp group, issued and not yet done
  std::function<void()> run;
};

struct Rendezvous {  // threads meet here; the last to come acts for all
  int arrived = 0;
  std::uint64_t round = 0;
};

struct Mbarrier {
  int count = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint64_t phase = 0;
};

struct Bulk {
  int block;  // to which it goes
  std::uint32_t to;
  const void* from;
  std::uint32_t bytes, barrier;
};

struct Block {
  int left = 0;  // threads that have ended
  std::vector<unsigned char> memory;
  std::vector<Chunk> chunks;
  std::map<std::uint32_t, Mbarrier> mbarriers;
  std::map<int, Rendezvous> named;  // 0: the whole block
  std::vector<Rendezvous> warps, groups;
  std::vector<std::vector<std::vector<Product>>> products;  // by warp group: committed sets, and an open one last
};

struct Fiber {
  ucontext_t context;  // to begin by; from then on it is left and entered by jumps, which need no system call
  jmp_buf here;
  bool begun = false;
  int block, thread;
  bool done = false, late = false;
  std::function<bool()> ready;  // empty: it can run
  const char* waits_for = "";
  std::vector<std::vector<Copy>> copies{{}};  // cp.async groups, the open one last
  std::vector<std::uint32_t> unfenced;        // chunks this thread wrote since its last proxy fence
  std::uint64_t slot[8];                      // what it brings to a rendezvous
};

class Machine {
 public:
  static constexpr std::uint32_t kBase = 1024 + 16;  // shared addresses do not start at 0, nor where a pattern does
  static constexpr std::size_t kStack = 64 << 10;

  Machine(int blocks, int threads, int shared_bytes, unsigned seed) : random(seed), threads(threads), blocks_(blocks) {
    for (Block& block : blocks_) {
      block.memory.assign(shared_bytes + kBase, 0xCD);
      block.chunks.assign((shared_bytes + kBase) / 16 + 1, Chunk::nothing);
      block.warps.resize((threads + 31) / 32);
      block.groups.resize((threads + 127) / 128);
      block.products.assign((threads + 127) / 128, {{}});
    }
    fibers_.resize(static_cast<std::size_t>(blocks) * threads);
    const unsigned one_in = 4u << random() % 6;  // late threads wait for each other too: now many, now few
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].block = static_cast<int>(i) / threads;
      fibers_[i].thread = static_cast<int>(i) % threads;
      fibers_[i].late = random() % one_in == 0;
    }
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    self = this;
    // Kept from run to run, and not cleared: fresh memory for every thread would take longer than all else.
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() < fibers_.size()) stacks.emplace_back(new char[kStack]);
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack = {stacks[i].get(), 0, kStack};
      makecontext(&fiber.context, &Machine::enter, 0);
    }
    std::size_t left = fibers_.size();
    while (left > 0) {
      if (!bulks_.empty() && random() % 256 == 0) land();
      Fiber* next = pick();
      if (next == nullptr && bulks_.empty()) fail(deadlock());
      if (!bulks_.empty() && (next == nullptr || (next->late && random() % 2))) {
        land();
        continue;
      }
      next->ready = nullptr;
      resume(*next);
      if (!error_.empty()) fail(error_);
      if (next->done) {
        --left;
        ++blocks_[next->block].left;
      }
    }
    if (!bulks_.empty()) fail("a bulk copy is still on its way when the block ends");
  }

  void wait(const char* what, std::function<bool()> ready) {
    if (ready() && random() % 4) return;  // now and then somebody else goes first all the same
    current->ready = std::move(ready);
    current->waits_for = what;
    if (_setjmp(current->here) == 0) _longjmp(scheduler_, 1);
  }

  // All of `count` threads meet; the last runs `act` before any goes on.
  void meet(Rendezvous& at, int count, const char* what, const std::function<void()>& act = {}) {
    if (++at.arrived > count) fail(std::string(what) + ": more threads than it was called for");
    if (at.arrived == count) {
      if (act) act();
      at.arrived = 0;
      ++at.round;
      return;
    }
    const std::uint64_t round = at.round;
    wait(what, [&at, round] { return at.round != round; });
  }

  Block& block() { return blocks_[current->block]; }
  Block& block(int rank) {
    if (rank < 0 || rank >= static_cast<int>(blocks_.size())) fail("a block rank outside the cluster");
    if (blocks_[rank].left == threads) fail("the shared memory of a block that has ended");
    return blocks_[rank];
  }
  Fiber& fiber(int block, int thread) { return fibers_[static_cast<std::size_t>(block) * threads + thread]; }
  int blocks() const { return static_cast<int>(blocks_.size()); }

  unsigned char* shared(Block& block, std::uint32_t address, std::uint32_t bytes) {
    if (address < kBase || address + bytes > block.memory.size()) fail("a shared address outside the block's memory");
    if (address % bytes) fail("a misaligned shared address");
    return block.memory.data() + address;
  }
  void read(Block& block, std::uint32_t address, std::uint32_t bytes, void* to, bool by_async_proxy) {
    const unsigned char* from = shared(block, address, bytes);
    const Chunk chunk = block.chunks[address / 16];
    if (chunk == Chunk::nothing) fail("shared memory is read that nothing was written to");
    if (chunk == Chunk::on_its_way) fail("shared memory is read (or was overwritten) while a copy is on its way to it");
    if (by_async_proxy && chunk == Chunk::unfenced) fail("a product reads what no proxy fence has passed since it was written");
    std::memcpy(to, from, bytes);
  }
  void write(Block& block, std::uint32_t address, const void* from, std::uint32_t bytes) {
    unsigned char* to = shared(block, address, bytes);
    if (block.chunks[address / 16] == Chunk::on_its_way) fail("shared memory is written while a copy is on its way to it");
    if (from != nullptr) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
    block.chunks[address / 16] = Chunk::unfenced;
    current->unfenced.push_back(address / 16);
  }

  void start(const Bulk& bulk) {
    if (bulk.to % 16 || bulk.bytes % 16 || reinterpret_cast<std::uintptr_t>(bulk.from) % 16) fail("a misaligned bulk copy");
    Block& to = block(bulk.block);
    shared(to, bulk.to, 16);
    shared(to, bulk.to + bulk.bytes - 16, 16);
    global(bulk.from, bulk.bytes);
    for (std::uint32_t at = bulk.to; at < bulk.to + bulk.bytes; at += 16) overwrite(to, at);
    bulks_.push_back(bulk);
  }
  void overwrite(Block& at, std::uint32_t address) {
    Chunk& chunk = at.chunks[address / 16];
    if (chunk == Chunk::on_its_way) fail("a copy starts to where another is on its way");
    chunk = Chunk::on_its_way;
  }

  // Every read of device memory has to lie in a buffer of the call.
  void global(const void* from, std::size_t bytes) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(from);
    for (const auto& [start, size] : buffers) {
      if (begin >= start && begin + bytes <= start + size) return;
    }
    fail("device memory is read outside every buffer of the call");
  }

  void advance(Mbarrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at an mbarrier than its count");
    if (barrier.pending == 0 && barrier.bytes == 0) {
      ++barrier.phase;
      barrier.pending = barrier.count;
    }
  }
  Mbarrier& mbarrier(Block& at, std::uint32_t address) {
    const auto found = at.mbarriers.find(address);
    if (found == at.mbarriers.end()) fail("an mbarrier is used that was not initialised");
    return found->second;
  }

  static Machine* self;
  Fiber* current = nullptr;
  std::mt19937 random;
  Rendezvous everybody;
  int threads;
  int grid_x = 0, grid_y = 0;  // of the cluster's first block
  std::vector<std::pair<std::uintptr_t, std::size_t>> buffers;

 private:
  static void enter() {
    try {
      (*self->body_)();
    } catch (const std::exception& error) {
      self->error_ = "block " + std::to_string(self->current->block) + " thread " + std::to_string(self->current->thread) + ": " + error.what();
    }
    self->current->done = true;
    _longjmp(self->scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }

  // Some threads run only when all others wait: what is ordered by luck alone then comes in the wrong order.
  Fiber* pick() {
    const std::size_t start = random() % fibers_.size();
    Fiber* last = nullptr;
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[(start + i) % fibers_.size()];
      if (fiber.done || (fiber.late && last != nullptr) || (fiber.ready && !fiber.ready())) continue;
      if (!fiber.late) return &fiber;
      last = &fiber;
    }
    return last;
  }

  void land() {
    const std::size_t which = random() % bulks_.size();
    const Bulk bulk = bulks_[which];
    bulks_.erase(bulks_.begin() + static_cast<std::ptrdiff_t>(which));
    Block& at = blocks_[bulk.block];
    if (at.left == threads) fail("a bulk copy lands in a block that has ended");
    std::memcpy(at.memory.data() + bulk.to, bulk.from, bulk.bytes);
    for (std::uint32_t chunk = bulk.to / 16; chunk < (bulk.to + bulk.bytes) / 16; ++chunk) at.chunks[chunk] = Chunk::settled;
    Mbarrier& barrier = mbarrier(at, bulk.barrier);
    barrier.bytes -= bulk.bytes;
    advance(barrier);
  }

  std::string deadlock() const {
    std::map<std::string, int> waiting;
    for (const Fiber& fiber : fibers_) {
      if (!fiber.done) ++waiting["block " + std::to_string(fiber.block) + " warp " + std::to_string(fiber.thread / 32) + " at " + fiber.waits_for];
    }
    std::string text = "deadlock:";
    for (const auto& [where, count] : waiting) text += " " + std::to_string(count) + " threads of " + where + ";";
    return text;
  }

  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<Bulk> bulks_;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::string error_;
};

inline Machine* Machine::self = nullptr;

}  // namespace emulator
