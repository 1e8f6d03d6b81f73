// Uninitialised memory aligned to a cache line.
#pragma once

#include <cstddef>
#include <new>

namespace cdfast {

class Buffer {
 public:
  explicit Buffer(size_t n_floats)
      : data_(static_cast<float*>(::operator new(n_floats * sizeof(float), kAlign))) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  float* data_;
};

}  // namespace cdfast
