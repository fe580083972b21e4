// Stands in for the library's own: sixteen numbers in a register on any CPU with AVX2, as AVX-512 has them.
#pragma once

#define SERVED 1
#define LONG 1
