"""One file per op: its contract, its plain-torch reference, its registration with torch and its gradients."""
