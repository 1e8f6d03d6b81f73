#define CDFAST_ISA avx512
#define CDFAST_VECTOR_BYTES 64
#include "backward.h"
#include "forward.h"

namespace cdfast {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = {
      "avx512",         avx512::pack,          avx512::forward_rows,
      avx512::map_rows, avx512::backward_rows, avx512::backward_keys};
  return kernels;
}

}  // namespace cdfast
