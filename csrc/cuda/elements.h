// 16 bytes of a row of logits as fp32 values, and back. Only here are dtypes and intrinsics known.
//
// Every function has a device text and a host text of the same meaning; tests/cuda_host runs the
// host one. NaN: widen keeps it, maxima pass it over (the sums carry it), narrow keeps it.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../cpu/half_bits.h"
#include "../objectives.h"

namespace pyoffline {
namespace gpu {

struct alignas(16) Packet {
  uint32_t words[4];
};

template <class T>
struct Elements {
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T));  // elements of a packet
  // A thread's share of one step: 16 elements, whatever the dtype.
  static constexpr int kPackets = 16 / kPer;
};

// The word that holds -inf in every element.
template <class T>
PYOFFLINE_HD constexpr uint32_t lowest_word();
template <>
PYOFFLINE_HD constexpr uint32_t lowest_word<float>() {
  return 0xff800000u;
}
template <>
PYOFFLINE_HD constexpr uint32_t lowest_word<bf16>() {
  return 0xff80ff80u;
}
template <>
PYOFFLINE_HD constexpr uint32_t lowest_word<f16>() {
  return 0xfc00fc00u;
}

template <class T>
PYOFFLINE_HD inline Packet lowest_packet() {
  constexpr uint32_t w = lowest_word<T>();
  return {{w, w, w, w}};
}

PYOFFLINE_HD inline float float_bits(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  return float_of(u);
#endif
}

PYOFFLINE_HD inline float widen(float x) { return x; }
PYOFFLINE_HD inline float widen(bf16 x) { return float_bits(static_cast<uint32_t>(x.bits) << 16); }
PYOFFLINE_HD inline float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  return to_float(x);
#endif
}

PYOFFLINE_HD inline void widen_packet(const Packet& packet, float, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = float_bits(packet.words[i]);
}
PYOFFLINE_HD inline void widen_packet(const Packet& packet, bf16, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = float_bits(packet.words[i] << 16);
    out[2 * i + 1] = float_bits(packet.words[i] & 0xffff0000u);
  }
}
PYOFFLINE_HD inline void widen_packet(const Packet& packet, f16, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = widen(f16{static_cast<uint16_t>(packet.words[i] & 0xffffu)});
    out[2 * i + 1] = widen(f16{static_cast<uint16_t>(packet.words[i] >> 16)});
  }
}

// Rounds to nearest even.
PYOFFLINE_HD inline void narrow(float x, float* out) { *out = x; }
PYOFFLINE_HD inline void narrow(float x, bf16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  from_float(x, out);
#endif
}
PYOFFLINE_HD inline void narrow(float x, f16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  from_float(x, out);
#endif
}

// Two elements as one word, the first one low.
PYOFFLINE_HD inline uint32_t narrow_pair(float low, float high, bf16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  bf16 pair[2];
  from_float(low, pair);
  from_float(high, pair + 1);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
#endif
}
PYOFFLINE_HD inline uint32_t narrow_pair(float low, float high, f16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  f16 pair[2];
  from_float(low, pair);
  from_float(high, pair + 1);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
#endif
}

#ifdef __CUDACC__
template <class T>
struct Pair;
template <>
struct Pair<bf16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<f16> {
  using type = __half2;
};
#endif

// Element by element the larger one of two words, the other one where one is NaN.
template <class T>
PYOFFLINE_HD inline uint32_t larger_pair(uint32_t first, uint32_t second, T) {
#ifdef __CUDA_ARCH__
  typename Pair<T>::type a, b;
  memcpy(&a, &first, 4);
  memcpy(&b, &second, 4);
  a = __hmax2(a, b);
  memcpy(&first, &a, 4);
  return first;
#else
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t a = static_cast<uint16_t>(first >> shift);
    const uint16_t b = static_cast<uint16_t>(second >> shift);
    const float at = widen(T{a});
    out |= static_cast<uint32_t>(at != at || widen(T{b}) > at ? b : a) << shift;
  }
  return out;
#endif
}
PYOFFLINE_HD inline uint32_t larger_pair(uint32_t first, uint32_t second, float) {
  const float best = fmaxf(float_bits(first), float_bits(second));
  memcpy(&first, &best, 4);
  return first;
}

// Element by element the larger one.
template <class T>
PYOFFLINE_HD inline void raise_packet(Packet* best, const Packet& next, T tag) {
#pragma unroll
  for (int i = 0; i < 4; ++i) best->words[i] = larger_pair(best->words[i], next.words[i], tag);
}

// The largest element, -inf if all are NaN.
template <class T>
PYOFFLINE_HD inline float packet_max(const Packet& packet, T tag) {
  const uint32_t* w = packet.words;
  const Packet best = {
      {larger_pair(larger_pair(w[0], w[1], tag), larger_pair(w[2], w[3], tag), tag)}};
  constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
  float values[Elements<T>::kPer], top = -INFINITY;
  widen_packet(best, tag, values);
#pragma unroll
  for (int i = 0; i < kInWord; ++i) top = fmaxf(top, values[i]);
  return top;
}

// 2^w for w <= 1; a result below FLT_MIN is 0, NaN stays NaN. Relative error below 2^-22.
PYOFFLINE_HD inline float exp2_flushed(float w) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(w));
  return e;
#else
  const float e = exp2f(w);
  return e < FLT_MIN ? 0.0f : e;
#endif
}

PYOFFLINE_HD inline Packet load_packet(const void* at) {
#ifdef __CUDA_ARCH__
  const uint4 word = *static_cast<const uint4*>(at);
  return {{word.x, word.y, word.z, word.w}};
#else
  Packet packet;
  memcpy(&packet, at, sizeof(packet));
  return packet;
#endif
}

template <int kPast>
PYOFFLINE_HD inline void store_packet(const Packet& packet, void* at) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0+%5], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)),
               "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]),
               "r"(packet.words[3]), "n"(kPast)
               : "memory");
#else
  memcpy(static_cast<char*>(at) + kPast, &packet, sizeof(packet));
#endif
}

// kCount values kPast elements after `out`, at an address that is a multiple of their size.
template <int kCount, int kPast = 0, class Out>
PYOFFLINE_HD inline void store_aligned(const float* values, Out* out) {
  constexpr int kBytes = kPast * static_cast<int>(sizeof(Out));
  if constexpr (sizeof(Out) == 4) {
    Packet packet;
#pragma unroll
    for (int i = 0; i < 4; ++i) memcpy(packet.words + i, values + i, 4);
    store_packet<kBytes>(packet, out);
  } else if constexpr (kCount == 8) {
    Packet packet;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packet.words[i] = narrow_pair(values[2 * i], values[2 * i + 1], Out{});
    store_packet<kBytes>(packet, out);
  } else {
    const uint32_t low = narrow_pair(values[0], values[1], Out{});
    const uint32_t high = narrow_pair(values[2], values[3], Out{});
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.u32 [%0+%3], {%1, %2};" ::"l"(__cvta_generic_to_global(out)),
                 "r"(low), "r"(high), "n"(kBytes)
                 : "memory");
#else
    const uint32_t words[2] = {low, high};
    memcpy(out + kPast, words, sizeof(words));
#endif
  }
}

}  // namespace gpu
}  // namespace pyoffline
