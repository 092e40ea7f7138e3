// Vectors of one register, on the compiler's vector extension: the same source gives SSE2, AVX2,
// AVX-512 or NEON code, by the flags a kernel file is compiled with. Intrinsics appear only
// where the extension has no word for it. Everything is in the namespace of the instruction
// set, so that two compilations of this header never share a symbol.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mor::MOR_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// A is float or double, the accumulate type; a vector holds kLanes<A> of them.
template <typename A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int kMantissaBits = 23;
};
template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 52;
};

template <typename A>
using vec_t = typename VecTraits<A>::Vec;
template <typename A>
using int_vec_t = typename VecTraits<A>::Int;
using Half = VecTraits<float>::Half;  // 16-bit patterns, one for each float lane
using UInt = uint32_t __attribute__((vector_size(kVectorBytes)));

template <typename A>
inline vec_t<A> splat(A value) {
  return value - vec_t<A>{};  // x - 0 is x, also for -0, so no instruction is left of it
}

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- 16-bit floats <-> fp32, round to nearest even, NaN stays NaN ----

inline vec_t<float> widen(Half half, bfloat16) {
  return bits_as<vec_t<float>>(__builtin_convertvector(half, UInt) << 16);
}

inline Half narrow(vec_t<float> x, bfloat16) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)x);  // denormals become 0
#else
  const UInt u = bits_as<UInt>(x);
  const UInt rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UInt quiet_nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet_nan, Half);
#endif
}

inline vec_t<float> widen(Half half, float16) {
#if defined(__AVX512F__)
  return (vec_t<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);  // unmasked, GCC warns
#elif defined(__F16C__)
  return (vec_t<float>)_mm256_cvtph_ps((__m128i)half);
#else
  // Shift exponent and mantissa into place; the product repairs the exponent's bias and turns
  // half denormals into normal floats. Infinities and NaNs get the top exponent back.
  const UInt u = __builtin_convertvector(half, UInt);
  const UInt sign = (u & 0x8000u) << 16;
  const UInt magnitude = (u & 0x7fffu) << 13;
  const UInt finite = bits_as<UInt>(bits_as<vec_t<float>>(magnitude) * 0x1p112f);
  return bits_as<vec_t<float>>(sign |
                               ((u & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
#endif
}

inline Half narrow(vec_t<float> x, float16) {
#if defined(__AVX512F__)
  return (Half)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const UInt u = bits_as<UInt>(x);
  const UInt sign = (u >> 16) & 0x8000u;
  const UInt magnitude = u & 0x7fffffffu;
  // Normal halves: re-bias the exponent and round at bit 13; a carry runs into the exponent and,
  // past the largest half, into infinity.
  const UInt normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal halves: adding 0.5 puts the rounding position at the last bit of the fp32 mantissa.
  const UInt denormal =
      bits_as<UInt>(bits_as<vec_t<float>>(magnitude) + 0.5f) - bits_as<UInt>(splat(0.5f));
  UInt half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? UInt{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : half;
  return __builtin_convertvector(sign | half, Half);
#endif
}

// ---- loads and stores: storage type T in memory, accumulate type in the register ----

template <typename T>
inline vec_t<accumulate_t<T>> load(const T* from) {
  using A = accumulate_t<T>;
  if constexpr (sizeof(T) == 2) {
    Half half;
    std::memcpy(&half, from, sizeof(half));
    return widen(half, T{});
  } else {
    vec_t<A> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
}

template <typename T>
inline void store(T* to, vec_t<accumulate_t<T>> x) {
  if constexpr (sizeof(T) == 2) {
    const Half half = narrow(x, T{});
    std::memcpy(to, &half, sizeof(half));
  } else {
    std::memcpy(to, &x, sizeof(x));
  }
}

// The first count lanes only; the others are zero and are not touched in memory.
template <typename T>
inline vec_t<accumulate_t<T>> load_first(const T* from, int64_t count) {
  T lanes[kLanes<accumulate_t<T>>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_first(T* to, vec_t<accumulate_t<T>> x, int64_t count) {
  T lanes[kLanes<accumulate_t<T>>];
  store(lanes, x);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
inline accumulate_t<T> load_scalar(const T* from) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bits_as<float>(uint32_t{from->bits} << 16);
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__F16C__)
    return _cvtsh_ss(from->bits);
#else
    return load_first(from, 1)[0];
#endif
  } else {
    return *from;
  }
}

template <typename T>
inline void store_scalar(T* to, accumulate_t<T> x) {
  store_first(to, splat(x), 1);
}

// Calls f(offset, lanes) for whole vectors and once for the rest, if any; lanes is a
// compile-time constant in the first form, so f's loads and stores stay whole.
template <typename A, typename F>
inline void for_each_vector(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    f(i, std::integral_constant<int64_t, kLanes<A>>{});
  }
  if (i < count) {
    f(i, count - i);
  }
}

template <typename T, int64_t kCount>
inline vec_t<accumulate_t<T>> load_lanes(const T* from, std::integral_constant<int64_t, kCount>) {
  return load(from);
}
template <typename T>
inline vec_t<accumulate_t<T>> load_lanes(const T* from, int64_t count) {
  return load_first(from, count);
}
template <typename T, int64_t kCount>
inline void store_lanes(T* to, vec_t<accumulate_t<T>> x, std::integral_constant<int64_t, kCount>) {
  store(to, x);
}
template <typename T>
inline void store_lanes(T* to, vec_t<accumulate_t<T>> x, int64_t count) {
  store_first(to, x, count);
}

// ---- reductions over lanes, in a fixed tree order ----

template <typename A>
inline A sum_lanes(vec_t<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return _mm512_reduce_add_ps((__m512)x);
  }
#endif
  A lanes[kLanes<A>];
  std::memcpy(lanes, &x, sizeof(x));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] += lanes[i + width];
    }
  }
  return lanes[0];
}

// The larger one; a NaN in a is kept.
template <typename A>
inline vec_t<A> max(vec_t<A> a, vec_t<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return (vec_t<A>)_mm512_max_ps((__m512)b, (__m512)a);
  }
#endif
  return b > a ? b : a;
}

template <typename A>
inline A max_lanes(vec_t<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return _mm512_reduce_max_ps((__m512)x);
  }
#endif
  A lanes[kLanes<A>];
  std::memcpy(lanes, &x, sizeof(x));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
  }
  return lanes[0];
}

// ---- copies that bypass the cache ----

// Outputs larger than this are written past the cache: they would evict it and be evicted.
inline constexpr int64_t kStreamBytes = 4 << 20;

// Stores one vector's bytes to an address aligned to them.
inline void stream_store(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  std::memcpy(to, from, kVectorBytes);
#endif
}

// Copies bytes with non-temporal stores where the machine has them. fence() before the data is
// read by another thread.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  const int64_t head = (kLine - (reinterpret_cast<uintptr_t>(out) & (kLine - 1))) & (kLine - 1);
  if (bytes >= head + kLine) {
    std::memcpy(out, in, static_cast<size_t>(head));
    out += head, in += head, bytes -= head;
    for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine) {
      for (int64_t i = 0; i < kLine; i += kVectorBytes) {
        stream_store(out + i, in + i);
      }
    }
  }
  std::memcpy(out, in, static_cast<size_t>(bytes));
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mor::MOR_ISA
