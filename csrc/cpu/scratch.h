// Working memory of one call, aligned for vectors and carved up front to back.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace ceat_cpu {

class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : memory_(std::aligned_alloc(64, round_up(bytes))), next_(static_cast<char*>(memory_)) {
    if (memory_ == nullptr) std::abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <class X>
  X* take(size_t count) {
    X* block = reinterpret_cast<X*>(next_);
    next_ += round_up(count * sizeof(X));
    return block;
  }
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  void* memory_;
  char* next_;
};

}  // namespace ceat_cpu
