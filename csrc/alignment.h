// Alignment objectives on stored maps: the loss per sample and G = dL/dS (kernels/README.md).
#pragma once

#include "problem.h"

namespace cdfast {

enum class Objective : int { row = 0, map = 1, pooled = 2, mse = 3, kl = 4 };

// `map` holds S on entry and G afterwards; target is T in the same storage; loss is (n_samples,).
// G is the gradient of the sample's own loss, before any reduction. Sums are in double precision.
void alignment(const Axis& axis, Objective objective, float* map, const float* target, float* loss,
               int threads);

}  // namespace cdfast
