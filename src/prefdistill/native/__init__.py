"""C++ for x86-64 CPUs, compiled on the machine that runs it."""
