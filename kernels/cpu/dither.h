// The random numbers of stochastic rounding; see [Note: dither] in ../reference/dither.py.
#pragma once

#include "simd.h"

namespace {

constexpr uint32_t GOLDEN = 0x9E3779B9u;

// 16 random bits for every entry of a run, in order, two vectors at a time.
class Dither {
 public:
  // `first` is the even index of an entry, `phase` the 16 bits by which the step advances all numbers.
  Dither(uint32_t key, int64_t first, uint16_t phase) : phase_(splat(uint32_t(phase) * 0x10001u)) {
    const int64_t pair = first >> 1;
    // The upper half of the index matters from 2^33 entries on. A block does not cross a multiple of that.
    state_ = (iota() + uint32_t(pair)) * GOLDEN + (key + uint32_t(pair >> 32));
  }

  // The numbers of the next 2 * LANES entries.
  void next(u32 &low, u32 &high) {
    u32 mixed = state_;
    state_ += uint32_t(LANES) * GOLDEN;
    mixed ^= mixed >> 16;
    mixed *= 0x85EBCA6Bu;
    mixed ^= mixed >> 13;
    mixed *= 0xC2B2AE35u;
    mixed ^= mixed >> 16;
    // Both halves advance by themselves: no carry from the one into the other.
    typedef uint16_t halves __attribute__((vector_size(4 * LANES)));
    const halves sum = as<halves>(mixed) + as<halves>(phase_);
    u16 parts[2];
    memcpy(parts, &sum, sizeof sum);
    low = widen(parts[0]);
    high = widen(parts[1]);
  }

 private:
  u32 state_;
  u32 phase_;
};

}  // namespace
