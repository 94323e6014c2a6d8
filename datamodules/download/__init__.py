"""Public datasets by a command: address and licence, a download that goes on where it was cut, and careful unpacking."""
