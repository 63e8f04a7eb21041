// How rows of logits are laid over SIMD lanes. One algorithm serves both layouts.
//
//   SampleLanes  few classes: lane = sample, step = class; sums over steps are row sums.
//   ClassLanes   many classes: lanes run over a sample's classes; row sums add up the lanes.
//
// A tile holds the rows of one member for up to kLanes samples: a strip of `steps` vectors for all of them in
// SampleLanes, one for each in ClassLanes. What is one number for a row (a maximum, a sum, a weight) is a lane of a
// vector in both, lane = sample: `put` takes it from a strip and `spread` brings it back.
//
// Gradients go straight to memory, where the true class is written last, over what the other classes' formula gave
// there. Positions that are no class (the end of the last vector in ClassLanes, samples past the end in SampleLanes)
// add nothing to a row's sums and are never stored.
#pragma once

#include <limits>

#include "convert.h"
#include "vec.h"

namespace ceat {
inline namespace CEAT_ISA {

template <class T>
struct Tile {
  using Vec = VecOf<T>;

  int64_t classes, samples;
  int64_t labels[kLanes<T>] = {};

  Tile(int64_t classes, int64_t samples, const int64_t* target) : classes(classes), samples(samples) {
    for (int64_t w = 0; w < samples; ++w) labels[w] = target[w];
  }
  template <class Out>
  void store_true_class(Vec value, Out* rows) const {
    for (int64_t w = 0; w < samples; ++w) rows[w * classes + labels[w]] = narrow<Out>(value[w]);
  }
};

template <class T>
struct SampleLanes : Tile<T> {
  using typename Tile<T>::Vec;
  using Tile<T>::Tile, Tile<T>::classes, Tile<T>::samples, Tile<T>::labels;

  static int64_t most_samples(int64_t, int64_t) { return kLanes<T>; }
  static int64_t strip(int64_t classes) { return classes * kLanes<T>; }  // scalars
  static int64_t strips(int64_t) { return 1; }

  static Vec row_sum(Vec v) { return v; }
  static void put(int64_t, Vec value, Vec& rows) { rows = value; }
  static Vec spread(Vec rows, int64_t) { return rows; }

  // Fills the strip and returns the rows' maxima.
  template <class In>
  Vec load_strip(const In* row, int64_t sample_stride, T* to) const {
    Vec largest = Vec{} - std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < classes; ++k) {
      Vec z{};
      if (samples == kLanes<T>) {
        for (int w = 0; w < kLanes<T>; ++w) z[w] = widen<T>(row[w * sample_stride + k]);
      } else {
        for (int w = 0; w < samples; ++w) z[w] = widen<T>(row[w * sample_stride + k]);
      }
      largest = max(z, largest);
      store(to + k * kLanes<T>, z);
    }
    return largest;
  }
  template <class Out>
  void store_classes(int64_t, int64_t step, Vec value, Out* rows) const {
    if (samples == kLanes<T>) {
      for (int w = 0; w < kLanes<T>; ++w) rows[w * classes + step] = narrow<Out>(value[w]);
    } else {
      for (int w = 0; w < samples; ++w) rows[w * classes + step] = narrow<Out>(value[w]);
    }
  }

  Vec true_class(const T* strip, int64_t) const {
    Vec value;
    for (int w = 0; w < kLanes<T>; ++w) value[w] = strip[labels[w] * kLanes<T> + w];
    return value;
  }
  void rule_out_true_class(T* strip, int64_t) const {
    for (int w = 0; w < kLanes<T>; ++w) strip[labels[w] * kLanes<T> + w] = -std::numeric_limits<T>::infinity();
  }
};

template <class T>
struct ClassLanes : Tile<T> {
  using typename Tile<T>::Vec;
  using Tile<T>::Tile, Tile<T>::classes, Tile<T>::samples, Tile<T>::labels;

  // As many as the second-level cache holds beside what comes in and goes out.
  static int64_t most_samples(int64_t classes, int64_t members) {
    constexpr int64_t kBytes = 64 << 10;
    const int64_t fitting = kBytes / (2 * members * strip(classes) * int64_t(sizeof(T)));
    return fitting < 1 ? 1 : fitting > kLanes<T> ? kLanes<T> : fitting;
  }
  static int64_t strip(int64_t classes) { return (classes + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  static int64_t strips(int64_t samples) { return samples; }

  static Vec row_sum(Vec v) {
    return Vec{} + fold_lanes<T, kLanes<T>>(v, [](auto a, auto b) { return a + b; });
  }
  static Vec row_max(Vec v) {
    return Vec{} + fold_lanes<T, kLanes<T>>(v, [](auto a, auto b) { return a > b ? a : b; });
  }
  static void put(int64_t sample, Vec value, Vec& rows) { rows[sample] = value[0]; }
  static Vec spread(Vec rows, int64_t sample) { return Vec{} + rows[sample]; }

  template <class In>
  Vec load_strip(const In* row, int64_t, T* to) const {
    constexpr T kNoClass = -std::numeric_limits<T>::infinity();
    const int64_t whole = classes / kLanes<T> * kLanes<T>;
    Vec largest = Vec{} + kNoClass;
    for (int64_t k = 0; k < whole; k += kLanes<T>) {
      const Vec z = load_wide(row + k);
      largest = max(z, largest);
      store(to + k, z);
    }
    if (whole < classes) {
      store(to + whole, Vec{} + kNoClass);
      for (int64_t k = whole; k < classes; ++k) to[k] = widen<T>(row[k]);
      largest = max(load<Vec>(to + whole), largest);
    }
    return row_max(largest);
  }
  template <class Out>
  void store_classes(int64_t sample, int64_t step, Vec value, Out* rows) const {
    const int64_t first = step * kLanes<T>;
    Out* const row = rows + sample * classes;
    if (first + kLanes<T> <= classes) {
      store_narrow(row + first, value);
    } else {
      for (int64_t k = first; k < classes; ++k) row[k] = narrow<Out>(value[k - first]);
    }
  }

  Vec true_class(const T* strip, int64_t sample) const { return Vec{} + strip[labels[sample]]; }
  void rule_out_true_class(T* strip, int64_t sample) const {
    strip[labels[sample]] = -std::numeric_limits<T>::infinity();
  }
};

}  // namespace CEAT_ISA
}  // namespace ceat
