"""C++ for CPUs with bfloat16 products, compiled on the machine that runs it."""
