#pragma once
#include <cmath>
#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
