// Vectors of fp32, loaded from and rounded to each dtype: one struct an instruction set, all with the same three
// members. Included once, inside a region whose functions may use that set (sum.cpp).
//   kLanes; load<dtype>(pointer) -> Vector; store<dtype>(pointer, Vector); add(Vector, Vector)
// store rounds to nearest even; a NaN stays a NaN; subnormals are kept.

#if defined(SGL_VEC_AVX512)
struct Vec {
  using Vector = __m512;
  static constexpr size_t kLanes = 16;

  template <DType dtype>
  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  template <DType dtype>
  static void store(void* p, Vector v) {
    if constexpr (dtype == DType::kFloat32) {
      _mm512_storeu_ps(p, v);
    } else if constexpr (dtype == DType::kFloat16) {
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m512i bits = _mm512_castps_si512(v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      rounded =
          _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
  }

  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
};

#elif defined(SGL_VEC_AVX2)
struct Vec {
  using Vector = __m256;
  static constexpr size_t kLanes = 8;

  template <DType dtype>
  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if constexpr (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  template <DType dtype>
  static void store(void* p, Vector v) {
    if constexpr (dtype == DType::kFloat32) {
      _mm256_storeu_ps(static_cast<float*>(p), v);
    } else if constexpr (dtype == DType::kFloat16) {
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m256i bits = _mm256_castps_si256(v);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
  }

  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
};

#elif defined(SGL_VEC_NEON)
struct Vec {
  using Vector = float32x4_t;
  static constexpr size_t kLanes = 4;

  template <DType dtype>
  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) return vld1q_f32(static_cast<const float*>(p));
    const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(p));
    if constexpr (dtype == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }

  template <DType dtype>
  static void store(void* p, Vector v) {
    if constexpr (dtype == DType::kFloat32) {
      vst1q_f32(static_cast<float*>(p), v);
    } else if constexpr (dtype == DType::kFloat16) {
      vst1_u16(static_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
    } else {
      const uint32x4_t bits = vreinterpretq_u32_f32(v);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
      vst1_u16(static_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
    }
  }

  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
};

#else
// One lane, for the ends of the arrays and for machines without any of the above.
struct Vec {
  using Vector = float;
  static constexpr size_t kLanes = 1;

  template <DType dtype>
  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) {
      float value;
      memcpy(&value, p, sizeof value);
      return value;
    }
    uint16_t half;
    memcpy(&half, p, sizeof half);
    if constexpr (dtype == DType::kFloat16) return torch::headeronly::detail::fp16_ieee_to_fp32_value(half);
    return from_bits(uint32_t{half} << 16);
  }

  template <DType dtype>
  static void store(void* p, Vector v) {
    if constexpr (dtype == DType::kFloat32) {
      memcpy(p, &v, sizeof v);
      return;
    }
    uint16_t half;
    if constexpr (dtype == DType::kFloat16) {
      half = torch::headeronly::detail::fp16_ieee_from_fp32_value(v);
    } else {
      uint32_t bits;
      memcpy(&bits, &v, sizeof bits);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      half = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    memcpy(p, &half, sizeof half);
  }

  static Vector add(Vector a, Vector b) { return a + b; }

 private:
  static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};
#endif

// The sum over the first `whole` elements, a multiple of kLanes.
template <DType dtype, int num_sources>
void sum_whole_vectors(void* out, const void* const* sources, size_t whole) {
  constexpr size_t kSize = size_of(dtype);
  const char* source[num_sources];
  for (int r = 0; r < num_sources; ++r) source[r] = static_cast<const char*>(sources[r]);
#pragma GCC unroll 4
  for (size_t byte = 0; byte < whole * kSize; byte += Vec::kLanes * kSize) {
    Vec::Vector total = Vec::load<dtype>(source[0] + byte);
    for (int r = 1; r < num_sources; ++r) total = Vec::add(total, Vec::load<dtype>(source[r] + byte));
    Vec::store<dtype>(static_cast<char*>(out) + byte, total);
  }
}

inline void sum_vectors(DType dtype, void* out, const void* const* sources, int num_sources, size_t whole) {
  visit_dtype(dtype, [&](auto d) {
    visit_world(num_sources, [&](auto n) { sum_whole_vectors<d.value, n.value>(out, sources, whole); });
  });
}
