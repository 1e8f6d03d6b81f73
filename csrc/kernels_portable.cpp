#define CDFAST_ISA portable
#define CDFAST_VECTOR_BYTES 16
#include "backward.h"
#include "forward.h"

namespace cdfast {

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = {
      "portable",         portable::pack,          portable::forward_rows,
      portable::map_rows, portable::backward_rows, portable::backward_keys};
  return kernels;
}

}  // namespace cdfast
