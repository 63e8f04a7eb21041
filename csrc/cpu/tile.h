// How rows of logits are laid over SIMD lanes. One algorithm serves both layouts, because each only says where a class
// sits and how a per-lane sum becomes the row's sum.
//
//   SampleLanes  few classes: a tile is kLanes samples, lane = sample, step = class; sums over steps are row sums.
//   ClassLanes   many classes: a tile is one sample, lanes run over its classes; row sums add up the lanes.
//
// A tile holds one row per sample: `steps` vectors of scalars. Gradients go straight to memory, where the true class is
// written last, over what the other classes' formula gave there. Positions that are no class (the end of the last
// vector in ClassLanes, samples past the end in SampleLanes) add nothing to a row's sums and are never stored.
#pragma once

#include <limits>

#include "convert.h"
#include "vec.h"

namespace ceat {
inline namespace CEAT_ISA {

template <class T>
struct SampleLanes {
  using Vec = VecOf<T>;
  static constexpr int kSamples = kLanes<T>;

  int64_t classes, samples;
  int64_t labels[kSamples] = {};

  SampleLanes(int64_t classes, int64_t samples, const int64_t* target) : classes(classes), samples(samples) {
    for (int64_t w = 0; w < samples; ++w) labels[w] = target[w];
  }
  static int64_t steps(int64_t classes) { return classes; }

  static Vec row_sum(Vec v) { return v; }

  // Fills the tile and returns the rows' maxima.
  template <class In>
  Vec load_row(const In* row, int64_t sample_stride, T* tile) const {
    Vec largest = Vec{} - std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < classes; ++k) {
      Vec z{};
      if (samples == kSamples) {
        for (int w = 0; w < kSamples; ++w) z[w] = widen<T>(row[w * sample_stride + k]);
      } else {
        for (int w = 0; w < samples; ++w) z[w] = widen<T>(row[w * sample_stride + k]);
      }
      largest = max(z, largest);
      store(tile + k * kSamples, z);
    }
    return largest;
  }
  template <class Out>
  void store_classes(int64_t step, Vec value, Out* rows) const {
    if (samples == kSamples) {
      for (int w = 0; w < kSamples; ++w) rows[w * classes + step] = narrow<Out>(value[w]);
    } else {
      for (int w = 0; w < samples; ++w) rows[w * classes + step] = narrow<Out>(value[w]);
    }
  }
  template <class Out>
  void store_true_class(Vec value, Out* rows) const {
    for (int w = 0; w < samples; ++w) rows[w * classes + labels[w]] = narrow<Out>(value[w]);
  }

  Vec true_class(const T* tile) const {
    Vec value;
    for (int w = 0; w < kSamples; ++w) value[w] = tile[labels[w] * kSamples + w];
    return value;
  }
  void set_true_class(T* tile, Vec value) const {
    for (int w = 0; w < kSamples; ++w) tile[labels[w] * kSamples + w] = value[w];
  }
};

template <class T>
struct ClassLanes {
  using Vec = VecOf<T>;
  static constexpr int kSamples = 1;

  int64_t classes, label;
  static constexpr int64_t samples = 1;

  ClassLanes(int64_t classes, int64_t, const int64_t* target) : classes(classes), label(*target) {}
  static int64_t steps(int64_t classes) { return (classes + kLanes<T> - 1) / kLanes<T>; }

  static Vec row_sum(Vec v) {
    return Vec{} + fold_lanes<T, kLanes<T>>(v, [](auto a, auto b) { return a + b; });
  }
  static Vec row_max(Vec v) {
    return Vec{} + fold_lanes<T, kLanes<T>>(v, [](auto a, auto b) { return a > b ? a : b; });
  }

  template <class In>
  Vec load_row(const In* row, int64_t, T* tile) const {
    constexpr T kNoClass = -std::numeric_limits<T>::infinity();
    const int64_t whole = classes / kLanes<T> * kLanes<T>;
    Vec largest = Vec{} + kNoClass;
    for (int64_t k = 0; k < whole; k += kLanes<T>) {
      const Vec z = load_wide(row + k);
      largest = max(z, largest);
      store(tile + k, z);
    }
    if (whole < classes) {
      store(tile + whole, Vec{} + kNoClass);
      for (int64_t k = whole; k < classes; ++k) tile[k] = widen<T>(row[k]);
      largest = max(load<Vec>(tile + whole), largest);
    }
    return row_max(largest);
  }
  template <class Out>
  void store_classes(int64_t step, Vec value, Out* row) const {
    const int64_t first = step * kLanes<T>;
    if (first + kLanes<T> <= classes) {
      store_narrow(row + first, value);
    } else {
      for (int64_t k = first; k < classes; ++k) row[k] = narrow<Out>(value[k - first]);
    }
  }
  template <class Out>
  void store_true_class(Vec value, Out* row) const {
    row[label] = narrow<Out>(value[0]);
  }

  Vec true_class(const T* tile) const { return Vec{} + tile[label]; }
  void set_true_class(T* tile, Vec value) const { tile[label] = value[0]; }
};

}  // namespace CEAT_ISA
}  // namespace ceat
