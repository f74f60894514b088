// How importance is stored, in blocks of 256 entries; see ../reference/codecs.py, which gives the same bits.
#pragma once

#include "dither.h"

namespace {

constexpr int BLOCK = 256;
constexpr float LARGEST = 3.40282346638528859812e38f;

// Their `encode` returns the scale of a block, zero where the format has none. `values(part)` are its vectors, and
// ASKS_ONCE says that each is asked for once.
struct Fp32 {
  typedef float Code;
  static constexpr bool ASKS_ONCE = true;

  static f32 decode(const Code *codes, float) { return load<f32>(codes); }

  template <class Values>
  static float encode(Code *codes, Values values, Dither &) {
    for (int part = 0; part < BLOCK / LANES; part++) store(codes + part * LANES, values(part));
    return 0;
  }
};

// The 16 bits of the fp32 pattern above the lowest SHIFT ones.
template <int SHIFT>
struct Upper16 {
  typedef uint16_t Code;
  static constexpr bool ASKS_ONCE = true;

  static f32 decode(const Code *codes, float) { return as<f32>(widen(load<u16>(codes)) << SHIFT); }

  template <class Values>
  static float encode(Code *codes, Values values, Dither &dither) {
    u32 random[2];
    for (int part = 0; part < BLOCK / LANES; part += 2) {
      dither.next(random[0], random[1]);
      for (int half = 0; half < 2; half++) {
        const u32 raised = as<u32>(values(part + half)) + (random[half] >> (16 - SHIFT));
        // Rounding the largest finite values up would give the pattern of infinity.
        const i32 finite = min_of(as<i32>(raised), splat(int32_t(0x7F7FFFFF)));
        store(codes + (part + half) * LANES, narrow16(as<u32>(finite) >> SHIFT));
      }
    }
    return 0;
  }
};

typedef Upper16<15> U16;
typedef Upper16<16> BF16;

// The square root of the value relative to the block's largest, in 255 steps.
struct U8 {
  typedef uint8_t Code;
  static constexpr bool ASKS_ONCE = false;

  static f32 decode(const Code *codes, float unit) { return min_of(decode_unbounded(codes, unit), splat(LARGEST)); }

  // Infinity where `decode` would saturate.
  static f32 decode_unbounded(const Code *codes, float unit) {
    const f32 code = to_float(as<i32>(widen(load<u8>(codes))));
    return code * code * unit;
  }

  // Most blocks are finite without bounds on anything, which would be a fifth of the work.
  template <class Values>
  static float encode(Code *codes, Values values, Dither &dither) {
    // Rounding starts from the largest of all values, so they are kept.
    f32 kept[BLOCK / LANES];
    u32 lanes{};
    for (int part = 0; part < BLOCK / LANES; part++) {
      kept[part] = values.unbounded(part);
      lanes = max_of(lanes, as<u32>(kept[part]));
    }
    // The order of patterns is that of values, infinity and NaN being the largest.
    if (largest_of(lanes) >= 0x7F800000u) {
      lanes = u32{};
      for (int part = 0; part < BLOCK / LANES; part++) {
        kept[part] = values(part);
        lanes = max_of(lanes, as<u32>(kept[part]));
      }
    }
    float largest = as<float>(largest_of(lanes));
    // Codes of a smaller block would stand for denormal numbers, which round too coarsely to decay.
    if (largest < 0x1p-110f) largest = 0;
    const float inverse = largest > 0 ? 65025.0f / largest : 0.0f;
    const float upper = inverse * (1.0f + 0x1p-21f), lower = inverse * (1.0f - 0x1p-21f);
    u32 random[2];
    for (int part = 0; part < BLOCK / LANES; part += 2) {
      dither.next(random[0], random[1]);
      for (int half = 0; half < 2; half++) {
        const f32 value = kept[part + half];
        const i32 whole = to_int(root_of(value * upper));
        const f32 below = to_float(whole);
        // A random share of the gap to the next square; 2^-16 is exact anywhere in the product.
        const f32 gap = exact_product_plus(below, splat(0x1p-15f), splat(0x1p-16f));
        const f32 above = exact_product_plus(-below, below, value * lower);
        const i32 code = plus_one_where_less(whole, to_float(as<i32>(random[half])) * gap, above);
        store(codes + (part + half) * LANES, narrow8(as<u32>(code)));
      }
    }
    return largest;
  }
};

}  // namespace
