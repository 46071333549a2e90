// Vectors of fp32 that are loaded from, and rounded to, each dtype: one Vec<dtype> an instruction set, all with the
// same members. Included once for each set, inside a region whose functions may use it (sum.cpp).
//   kLanes; Vector; load(pointer) -> Vector; add(Vector, Vector); store(pointer, Vector)
// store rounds to nearest even; a NaN stays a NaN; subnormals are kept.
// bf16 is taken in pairs: the elements at even positions in one fp32 vector, those at odd positions in another, which
// spares widening and narrowing across lanes.

template <DType dtype>
struct Vec;

#if defined(SGL_VEC_AVX512)
template <>
struct Vec<DType::kFloat32> {
  using Vector = __m512;
  static constexpr size_t kLanes = 16;
  static Vector load(const void* p) { return _mm512_loadu_ps(p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static void store(void* p, Vector v) { _mm512_storeu_ps(p, v); }
};

template <>
struct Vec<DType::kFloat16> {
  using Vector = __m512;
  static constexpr size_t kLanes = 16;
  static Vector load(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static void store(void* p, Vector v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <>
struct Vec<DType::kBFloat16> {
  struct Vector {
    __m512 even, odd;
  };
  static constexpr size_t kLanes = 32;
  static Vector load(const void* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
  }
  static Vector add(Vector a, Vector b) { return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)}; }
  static void store(void* p, Vector v) {
    const __m512i even = _mm512_srli_epi32(rounded(v.even), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(v.odd)));
  }

 private:
  // The result in the upper half of each lane.
  static __m512i rounded(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  }
};

#elif defined(SGL_VEC_AVX2)
template <>
struct Vec<DType::kFloat32> {
  using Vector = __m256;
  static constexpr size_t kLanes = 8;
  static Vector load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static void store(void* p, Vector v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
};

template <>
struct Vec<DType::kFloat16> {
  using Vector = __m256;
  static constexpr size_t kLanes = 8;
  static Vector load(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static void store(void* p, Vector v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <>
struct Vec<DType::kBFloat16> {
  struct Vector {
    __m256 even, odd;
  };
  static constexpr size_t kLanes = 16;
  static Vector load(const void* p) {
    const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)))};
  }
  static Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.even, b.even), _mm256_add_ps(a.odd, b.odd)}; }
  static void store(void* p, Vector v) {
    const __m256i even = _mm256_srli_epi32(rounded(v.even), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded(v.odd), 0xaa));
  }

 private:
  // The result in the upper half of each lane.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
};

#elif defined(SGL_VEC_NEON)
template <DType dtype>
struct Vec {
  using Vector = float32x4_t;
  static constexpr size_t kLanes = 4;

  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) return vld1q_f32(static_cast<const float*>(p));
    const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(p));
    if constexpr (dtype == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }

  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }

  static void store(void* p, Vector v) {
    if constexpr (dtype == DType::kFloat32) {
      vst1q_f32(static_cast<float*>(p), v);
    } else if constexpr (dtype == DType::kFloat16) {
      vst1_u16(static_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
    } else {
      const uint32x4_t bits = vreinterpretq_u32_f32(v);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
      vst1_u16(static_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16));
    }
  }
};

#else
// One lane, for the ends of the arrays and for machines without any of the above.
template <DType dtype>
struct Vec {
  using Vector = float;
  static constexpr size_t kLanes = 1;

  static Vector load(const void* p) {
    if constexpr (dtype == DType::kFloat32) {
      float value;
      memcpy(&value, p, sizeof value);
      return value;
    }
    uint16_t half;
    memcpy(&half, p, sizeof half);
    if constexpr (dtype == DType::kFloat16) return torch::headeronly::detail::fp16_ieee_to_fp32_value(half);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  static Vector add(Vector a, Vector b) { return a + b; }

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
};
#endif

// The sum of the first elements, as many as fill vectors; returns how many.
template <DType dtype, int num_sources>
size_t sum_whole_vectors(void* out, const void* const* sources, size_t count) {
  using V = Vec<dtype>;
  constexpr size_t kStep = V::kLanes * size_of(dtype);
  const size_t end = count / V::kLanes * kStep;
  const char* source[num_sources];
  for (int r = 0; r < num_sources; ++r) source[r] = static_cast<const char*>(sources[r]);
  for (size_t byte = 0; byte < end; byte += kStep) {
    typename V::Vector total = V::load(source[0] + byte);
    for (int r = 1; r < num_sources; ++r) total = V::add(total, V::load(source[r] + byte));
    V::store(static_cast<char*>(out) + byte, total);
  }
  return end / size_of(dtype);
}

inline size_t sum_vectors(DType dtype, void* out, const void* const* sources, int num_sources, size_t count) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_world(num_sources, [&](auto n) { return sum_whole_vectors<d.value, n.value>(out, sources, count); });
  });
}
