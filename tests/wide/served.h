// Stands in for the library's own: any CPU with AVX2 has AVX-512 BF16 and AMX, by intrinsics.h.
#pragma once

#include "intrinsics.h"

#define SERVED 1
#define LONG 1
#define FAST 1
#undef __AMX_BF16__
#define __AMX_BF16__ 1
