// The passes of the CPU backend: lists of tasks over the inner loops of one instruction set.
#pragma once

#include "problem.h"

namespace cdfast {

// out, lse and, where p.map is given, S. The map holds zeros on entry.
void attention_forward(const Problem& p, const Kernels& kernels);

// S from q, k and lse, into a map of zeros.
void map_forward(const Problem& p, const Kernels& kernels);

// dq, dk, dv from d_out, d_lse and (map = G, d_loss), each of which may be absent; p.modular: dq,
// dk and, in p.delta, the gradient of lse.
void attention_backward(const Problem& p, const Kernels& kernels);

}  // namespace cdfast
