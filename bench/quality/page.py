"""The page of a results file: what was measured and how, the picture and the table."""

from __future__ import annotations

import textwrap
from pathlib import Path

from bench.quality.protocol import IN_DOMAIN, OTHER_VALIDATION, OUT_OF_DOMAIN, VALIDATION, Protocol
from bench.quality.report import Rows, markdown


def page(rows: Rows, protocol: Protocol, validate: bool, picture: Path) -> str:
    """Markdown, to lie beside the picture."""
    return f"""# Quality: {protocol.name}

{textwrap.fill(_told(protocol, validate), 120)}

Each row is measured again by its NAME, at other seeds with `--seeds`:

```
python -m bench.quality {_options(protocol, validate)}--redo --rows NAME
```

![Perplexity against seconds, a panel for each pattern]({picture.name})

{markdown(rows)}
"""


def _told(protocol: Protocol, validate: bool) -> str:
    return (
        f"The model `{protocol.model}` is pruned and recovered on `{protocol.text}`: {protocol.windows} windows of "
        f"{protocol.seqlen} tokens calibrate, {protocol.steps} steps of {protocol.batch} windows retrain. "
        f"Perplexities, lower is better, are on {_texts(protocol, validate)}. "
        "An anchor is the figure of a reference implementation, or of the published definition, by the same protocol. "
        "Seconds are of the machine that the row's JSON names, which may have had other work. "
        '"Local error" is what refining masks did to the error of a linear\'s output on held-out windows, the mean of '
        "all linears; ± is the standard deviation over seeds."
    )


def _texts(protocol: Protocol, validate: bool) -> str:
    text, other = f"{protocol.text_windows} windows of its", f"{protocol.other_windows} of `{protocol.other}`"
    if validate:
        return f"{text} validation part ({VALIDATION}) and {other} behind the reported ones ({OTHER_VALIDATION})"
    return f"{text} test part ({IN_DOMAIN}) and the first {other} ({OUT_OF_DOMAIN}, out of domain)"


def _options(protocol: Protocol, validate: bool) -> str:
    return "--validate " * validate + "--protocol FILE " * (protocol != Protocol())
