"""Speed against the peer, in one run: `make benchmark`. Nothing here is imported by the package."""
