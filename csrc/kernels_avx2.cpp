#define CDFAST_ISA avx2
#define CDFAST_VECTOR_BYTES 32
#include "backward.h"
#include "forward.h"

namespace cdfast {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = {"avx2",         avx2::pack,          avx2::forward_rows,
                                      avx2::map_rows, avx2::backward_rows, avx2::backward_keys};
  return kernels;
}

}  // namespace cdfast
