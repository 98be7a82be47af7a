// The kernels of write_read.cpp, which includes this once for each length of vector, in a namespace of its own.
// VECTOR_BYTES is the length, TILE_ROWS the rows of a tile two vectors wide: as many as there are registers for.

template <class C> struct Simd {
  typedef C vec __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int L = VECTOR_BYTES / sizeof(C);
};
// A vector from memory and to it, aligned or not. By a copy: clang forgets a type's alignment in a template.
template <class C> inline typename Simd<C>::vec at(const C* p) {
  typename Simd<C>::vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class C> inline void put(C* p, typename Simd<C>::vec v) { std::memcpy(p, &v, sizeof v); }
template <class C> inline int64_t padded(int64_t d) { return (d + Simd<C>::L - 1) / Simd<C>::L * Simd<C>::L; }

// Matrix products on small matrices whose rows are padded to whole vectors

// sum over k < K of a[i * ai + k * ak] * b[k][w]
template <class C> struct Term {
  const C* a;
  int64_t ai, ak;
  const C* b;
  int64_t ldb, K;
};
// c[i][w] = factor[i] * start[i][w] + straight[i][w] + terms; a null factor is one, a null start or straight zero
template <class C> struct Product {
  C* c;
  int64_t ld;
  const C *start, *factor;
  Term<C> terms[2];
  int count;
  const C* straight = nullptr;
};

// A tile of RI rows from row i0 and RV vectors from column w0. Functions of their own: GCC gives them better registers.
template <class C, int RI, int RV> __attribute__((noinline)) void tile_nn(const Product<C>& p, int64_t i0, int64_t w0) {
  using vec = typename Simd<C>::vec;
  constexpr int L = Simd<C>::L;
  vec acc[RI][RV] = {};
  const auto each = [&](auto what) {
    for (int i = 0; i < RI; i++)
      for (int v = 0; v < RV; v++) what(acc[i][v], (i0 + i) * p.ld + w0 + v * L, i);
  };
  if (p.factor) each([&](vec& sum, int64_t e, int i) { sum = p.factor[i0 + i] * at(p.start + e); });
  else if (p.start) each([&](vec& sum, int64_t e, int) { sum = at(p.start + e); });
  if (p.straight) each([&](vec& sum, int64_t e, int) { sum += at(p.straight + e); });
  for (int term = 0; term < p.count; term++) {
    const Term<C>& t = p.terms[term];
    const C *a = t.a + i0 * t.ai, *b = t.b + w0;
#pragma GCC unroll 4
    for (int64_t k = 0; k < t.K; k++) {
      vec row[RV];
      for (int v = 0; v < RV; v++) row[v] = at(b + k * t.ldb + v * L);
      for (int i = 0; i < RI; i++) {
        const C s = a[i * t.ai + k * t.ak];
        for (int v = 0; v < RV; v++) acc[i][v] += s * row[v];
      }
    }
  }
  each([&](vec& sum, int64_t e, int) { put(p.c + e, sum); });
}

template <class C, int RI, int RV> inline void rows_nn(int64_t I, const Product<C>& p, int64_t i, int64_t w) {
  for (; i + RI <= I; i += RI) tile_nn<C, RI, RV>(p, i, w);
  if constexpr (RI > 1)
    if (i < I) rows_nn<C, RI - 1, RV>(I, p, i, w);
}

// I rows and W columns of a product; W whole vectors
template <class C> inline void nn(int64_t I, int64_t W, const Product<C>& p) {
  constexpr int L = Simd<C>::L;
  int64_t w = 0;
  constexpr bool many = TILE_ROWS > 6;  // registers
  if (many || I <= 4)
    for (; w + 4 * L <= W; w += 4 * L) rows_nn<C, many ? 4 : 2, 4>(I, p, 0, w);
  for (; w + 2 * L <= W; w += 2 * L) rows_nn<C, TILE_ROWS, 2>(I, p, 0, w);
  for (; w < W; w += L) rows_nn<C, 8, 1>(I, p, 0, w);
}
// c (+)= one term
template <class C> inline void nn(int64_t I, int64_t W, C* c, int64_t ld, const Term<C>& term, bool add) {
  Product<C> p;  // not {...}: to clear the second term takes longer than a small product
  p.c = c, p.ld = ld, p.start = add ? c : nullptr, p.factor = nullptr, p.terms[0] = term, p.count = 1;
  nn<C>(I, W, p);
}

// Shuffles of a pair of vectors, seen as 2L numbers: every second number; the first or last halves interleaved
template <class C> struct Shuffle {
  using vec = typename Simd<C>::vec;
  static constexpr int L = Simd<C>::L;
  using Lanes = std::make_integer_sequence<int, L>;
  static vec even(vec a, vec b) { return pick<0>(a, b, Lanes{}); }
  static vec odd(vec a, vec b) { return pick<1>(a, b, Lanes{}); }
  static vec low(vec a, vec b) { return interleave<0>(a, b, Lanes{}); }
  static vec high(vec a, vec b) { return interleave<L / 2>(a, b, Lanes{}); }

 private:
  template <int first, int... i> static vec pick(vec a, vec b, std::integer_sequence<int, i...>) {
    return lanes<(2 * i + first)...>(a, b);
  }
  template <int first, int... i> static vec interleave(vec a, vec b, std::integer_sequence<int, i...>) {
    return lanes<(i / 2 + (i % 2) * L + first)...>(a, b);
  }
  template <int... lane> static vec lanes(vec a, vec b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, lane...);
#else
    typedef std::conditional_t<sizeof(C) == 4, int32_t, int64_t> index;
    typedef index ivec __attribute__((vector_size(VECTOR_BYTES)));
    return __builtin_shuffle(a, b, ivec{lane...});
#endif
  }
};

// The sums of the N vectors x[0..N), as one vector; N at most L, what lies past the sums is zero
template <class C, int N, int length = Simd<C>::L>
__attribute__((always_inline)) inline typename Simd<C>::vec sums(typename Simd<C>::vec* x) {
  if constexpr (length > 1) {
    constexpr int half = (N + 1) / 2;
    for (int i = 0; i < half; i++) {
      const auto second = 2 * i + 1 < N ? x[2 * i + 1] : typename Simd<C>::vec{};
      x[i] = Shuffle<C>::even(x[2 * i], second) + Shuffle<C>::odd(x[2 * i], second);
    }
    return sums<C, half, length / 2>(x);
  } else {
    return x[0];
  }
}

// out[i] = a_i . b_i over W numbers, for I rows, at most N; a whole vector is stored
template <class C, int N>
inline void tile_dots(int64_t I, int64_t W, C* out, const C* a, int64_t lda, const C* b, int64_t ldb) {
  typename Simd<C>::vec acc[N];
  for (int e = 0; e < N; e++) {
    typename Simd<C>::vec row = {};
    if (e < I)
      for (int64_t w = 0; w < W; w += Simd<C>::L) row += at(a + e * lda + w) * at(b + e * ldb + w);
    acc[e] = row;
  }
  put(out, sums<C, N>(acc));
}
// out[i] = a_i . b_i over W numbers, for I rows; out has room for a whole vector past the last
template <class C>
inline void row_dots(int64_t I, int64_t W, C* out, const C* a, int64_t lda, const C* b, int64_t ldb) {
  constexpr int L = Simd<C>::L;
  for (; I > L / 2; I -= L, out += L, a += L * lda, b += L * ldb) tile_dots<C, L>(I, W, out, a, lda, b, ldb);
  if constexpr (L > 4)
    if (I > 4) return tile_dots<C, L / 2>(I, W, out, a, lda, b, ldb);
  if (I > 1) return tile_dots<C, (L < 4 ? L : 4)>(I, W, out, a, lda, b, ldb);
  if (I > 0) tile_dots<C, 1>(I, W, out, a, lda, b, ldb);
}

// c[i][j] = a_i . b_j over W numbers: RI x RJ dot products of rows, at most 16 of them
template <class C, int RI, int RJ>
__attribute__((noinline)) void tile_nt(int64_t W, C* c, int64_t ldc, const C* a, int64_t lda, const C* b, int64_t ldb) {
  constexpr int L = Simd<C>::L, N = RI * RJ, whole = N / L * L;
  typename Simd<C>::vec acc[N] = {};
  for (int64_t w = 0; w < W; w += L)
    for (int i = 0; i < RI; i++)
      for (int j = 0; j < RJ; j++) acc[i * RJ + j] += at(a + i * lda + w) * at(b + j * ldb + w);
  C total[whole + L];
  for (int group = 0; group < whole; group += L) put(total + group, sums<C, L>(acc + group));
  if constexpr (whole < N) put(total + whole, sums<C, N - whole>(acc + whole));
  for (int i = 0; i < RI; i++)
    for (int j = 0; j < RJ; j++) c[i * ldc + j] = total[i * RJ + j];
}
template <class C, int RI>
inline void columns_nt(int64_t J, int64_t W, C* c, int64_t ldc, const C* a, int64_t lda, const C* b, int64_t ldb) {
  for (; J >= 4; J -= 4, c += 4, b += 4 * ldb) tile_nt<C, RI, 4>(W, c, ldc, a, lda, b, ldb);
  if (J == 3) tile_nt<C, RI, 3>(W, c, ldc, a, lda, b, ldb);
  if (J == 2) tile_nt<C, RI, 2>(W, c, ldc, a, lda, b, ldb);
  if (J == 1) tile_nt<C, RI, 1>(W, c, ldc, a, lda, b, ldb);
}
// C[I x J] = A[I x W] B[J x W]^T. For few columns; otherwise transpose and nn.
template <class C>
inline void nt(int64_t I, int64_t J, int64_t W, C* c, int64_t ldc, const C* a, int64_t lda, const C* b, int64_t ldb) {
  for (; I >= 4; I -= 4, c += 4 * ldc, a += 4 * lda) columns_nt<C, 4>(J, W, c, ldc, a, lda, b, ldb);
  if (I == 3) columns_nt<C, 3>(J, W, c, ldc, a, lda, b, ldb);
  if (I == 2) columns_nt<C, 2>(J, W, c, ldc, a, lda, b, ldb);
  if (I == 1) columns_nt<C, 1>(J, W, c, ldc, a, lda, b, ldb);
}

// out[w][i] = a[i][w]: I x W to W x (I padded with zeros); W whole vectors
template <class C> inline void transpose(int64_t I, int64_t W, C* out, int64_t ldo, const C* a, int64_t lda) {
  constexpr int L = Simd<C>::L;
  for (int64_t i = 0; i < I; i += L)
    for (int64_t w = 0; w < W; w += L) {
      typename Simd<C>::vec x[L], y[L];
      for (int e = 0; e < L; e++) x[e] = i + e < I ? at(a + (i + e) * lda + w) : typename Simd<C>::vec{};
      for (int stage = 1; stage < L; stage *= 2) {
        for (int e = 0; e < L / 2; e++) {
          y[2 * e] = Shuffle<C>::low(x[e], x[e + L / 2]);
          y[2 * e + 1] = Shuffle<C>::high(x[e], x[e + L / 2]);
        }
        for (int e = 0; e < L; e++) x[e] = y[e];
      }
      for (int e = 0; e < L; e++) put(out + (w + e) * ldo + i, x[e]);
    }
}

// tanh in float to about five ulp: x times a quotient of polynomials in x^2, fitted up to where tanh is one; NaN stays NaN
inline Simd<float>::vec tanh_of(Simd<float>::vec x) {
  typedef Simd<float>::vec vec;
  const vec most = 9.01f + vec{};
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const vec s = x * x;
  vec p = s * 1.3335408e-8f + 2.0595247e-5f;
  p = p * s + 3.49475008e-3f;
  p = p * s + 1.33803211e-1f;
  p = p * s + 1.0f;
  vec q = s * 7.7686956e-7f + 3.28426222e-4f;
  q = q * s + 2.58737972e-2f;
  q = q * s + 4.67136366e-1f;
  q = q * s + 1.0f;
  return x * p / q;
}
inline Simd<double>::vec tanh_of(Simd<double>::vec x) {
  for (int e = 0; e < Simd<double>::L; e++) x[e] = std::tanh(x[e]);
  return x;
}

template <class C> struct Side {
  const SideArgs& a;
  int64_t n, m, d, dp;
  bool writes;        // columns: of the carry and, transposed, of B; else those that read
  int64_t carry, k;   // carry: n, or zero where it is the identity
  int64_t block, rp;  // tokens in a block, and their slots in whole vectors
  int64_t size;       // of a matrix k x rp: a row for each column, where the slots of a block lie side by side
  bool dynamic, turns;  // turns: the slots are transposed for their products; else the columns are too few for that
  C eps;
  Buffer<C> by_column, stat, scale;  // weights with gain and 1/sqrt(d), k x dp; k x rp, the same for each token
  Side(const SideArgs& a, const Args& sizes, bool writes, int64_t block)
      : a(a), n(sizes.n), m(sizes.m), d(sizes.d), dp(padded<C>(d)), writes(writes),
        carry(a.columns - m), k(!a.present ? 0 : writes ? carry + m : m), block(block), rp(padded<C>(block * n)),
        size(k * rp), dynamic(a.dynamic), turns(dynamic && 2 * k >= Simd<C>::L), eps(a.eps), by_column(dynamic ? k * dp : 0),
        stat(size), scale(size) {
    const Parameters& w = a.weights;
    const C root = std::sqrt(C(d));
    for (int64_t j = 0; j < k; j++) {
      for (int64_t row = 0; row < block * n; row++) {
        stat[j * rp + row] = of_slot(w.bias_alpha, w.bias_beta, row % n, j);
        if (dynamic) scale[j * rp + row] = of_slot(w.scale_alpha, w.scale_beta, row % n, j);
      }
      if (dynamic)
        for (int64_t c = 0; c < d; c++) by_column[j * dp + c] = gain(w)[c] * (of_weight(w, c, j) / root);
    }
  }
  // Column j in row i of a slot's matrix, and in row c of the weights
  C& of_slot(void* alpha, void* beta, int64_t i, int64_t j) const {
    if (writes && j >= carry) return static_cast<C*>(beta)[(j - carry) * n + i];
    return static_cast<C*>(alpha)[i * a.columns + (writes ? m : 0) + j];
  }
  C& of_weight(const Parameters& p, int64_t c, int64_t j) const {
    if (writes && j >= carry) return static_cast<C*>(p.dynamic_beta)[c * m + j - carry];
    return static_cast<C*>(p.dynamic_alpha)[c * a.columns + (writes ? m : 0) + j];
  }
  C* gain(const Parameters& p) const { return static_cast<C*>(p.slot_norm); }
};

// The routing columns of a block's tokens and what their backward needs again
template <class C> struct Routing {
  Buffer<C> c, t, p;  // coefficients, tanh, projection before the norm: k x rp
  Buffer<C> rs;       // 1 / rms of each slot, zero where there is none
  Buffer<C> turned;   // the slots, dp x rp; a vector may be read from any of them on
  explicit Routing(const Side<C>& s)
      : c(s.size), t(s.size), p(s.size), rs(s.rp), turned(s.turns ? s.dp * s.rp + Simd<C>::L : 0) {}
  void compute(const Side<C>& s, const C* h, int64_t rows) {
    using vec = typename Simd<C>::vec;
    constexpr int L = Simd<C>::L;
    if (!s.dynamic) {
      std::memcpy(c, s.stat, s.size * sizeof(C));
      return;
    }
    if (rows < s.block * s.n) {  // not what a full block has left
      std::memset(p, 0, s.size * sizeof(C));
      if (s.turns) std::memset(turned, 0, s.dp * s.rp * sizeof(C));
    }
    if (s.turns) {
      transpose<C>(rows, s.dp, turned, s.rp, h, s.dp);
      nn<C>(s.k, s.rp, p, s.rp, {s.by_column, s.dp, 1, turned, s.rp, s.d}, false);
      for (int64_t v = 0; v < s.rp; v += L) {
        vec even = {}, odd = {};
        for (int64_t w = 0; w < s.dp; w += 2) {
          even += at(turned + w * s.rp + v) * at(turned + w * s.rp + v);
          odd += at(turned + (w + 1) * s.rp + v) * at(turned + (w + 1) * s.rp + v);
        }
        put(rs + v, even + odd);
      }
    } else {
      nt<C>(s.k, rows, s.dp, p, s.rp, s.by_column, s.dp, h, s.dp);
      row_dots<C>(rows, s.dp, rs, h, s.dp, h, s.dp);
    }
    // Local pointers and numbers: a store may change any member, for all that a compiler knows.
    C *const coefficient = c, *const tanh = t, *const rstd = rs;
    const C *const projected = p, *const stat = s.stat, *const scale = s.scale, share = 1 / C(s.d), eps = s.eps;
    for (int64_t i = 0; i < s.rp; i++) rstd[i] = 1 / std::sqrt(rstd[i] * share + eps);
    for (int64_t i = rows; i < s.rp; i++) rstd[i] = 0;
    for (int64_t v = 0; v < s.rp; v += L) {
      const vec r = at(rstd + v);
      for (int64_t e = v; e < s.size; e += s.rp) {
        const vec x = tanh_of(at(projected + e) * r);
        put(tanh + e, x);
        put(coefficient + e, at(stat + e) + at(scale + e) * x);
      }
    }
  }
};

// Sums over a chunk of tokens of the gradients of one side
template <class C> struct Sums {
  std::vector<C> weight, stat, scale;  // k x dp (of the folded weight); as in Side
  explicit Sums(const Side<C>& s) : weight(s.dynamic ? s.k * s.dp : 0), stat(s.size), scale(s.size) {}
};

// From the gradient of the coefficients, dc, and of what they mixed, to that of the rows h; dc is overwritten.
// mixed is that of the first token; straight, where it is given, comes through an identity.
template <class C>
inline void routing_backward(const Side<C>& s, Routing<C>& r, const C* h, C* dc, const Term<C>& mixed, C* out,
                             Sums<C>* sums, C* slope, int64_t tokens, const C* straight = nullptr) {
  using vec = typename Simd<C>::vec;
  constexpr int L = Simd<C>::L;
  const int64_t rows = tokens * s.n;
  if (tokens < s.block)
    for (int64_t j = 0; j < s.k; j++) std::memset(dc + j * s.rp + rows, 0, (s.rp - rows) * sizeof(C));
  if (sums) {
    C* const of_static = sums->stat.data();
    for (int64_t e = 0; e < s.size; e += L) put(of_static + e, at(of_static + e) + at(dc + e));
  }
  const auto of_token = [&](int64_t t) {
    return Term<C>{mixed.a + t * s.n, mixed.ai, mixed.ak, mixed.b + t * mixed.K * s.dp, mixed.ldb, mixed.K};
  };
  if (!s.dynamic) {
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t first = t * s.n * s.dp;
      nn<C>(s.n, s.dp, {out + first, s.dp, straight ? straight + first : nullptr, nullptr, {of_token(t), {}}, 1});
    }
    return;
  }
  C* const of_scale = sums ? sums->scale.data() : nullptr;
  const C *const tanh = r.t, *const projection = r.p, *const rstd = r.rs, *const scale = s.scale;
  const C per_number = C(-1) / s.d;
  for (int64_t v = 0; v < s.rp; v += L) {
    const vec rs = at(rstd + v);
    vec dot = {};
    for (int64_t e = v; e < s.size; e += s.rp) {
      const vec t = at(tanh + e), of_coefficient = at(dc + e);
      if (sums) put(of_scale + e, at(of_scale + e) + of_coefficient * t);
      const vec g = of_coefficient * at(scale + e) * (1 - t * t);
      dot += g * at(projection + e);
      put(dc + e, g * rs);
    }
    put(slope + v, rs * rs * rs * dot * per_number);
  }
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t row = t * s.n;
    const Term<C> projected{dc + row, 1, s.rp, s.by_column, s.dp, s.k};
    const C* const through = straight ? straight + row * s.dp : nullptr;
    nn<C>(s.n, s.dp, {out + row * s.dp, s.dp, h + row * s.dp, slope + row, {of_token(t), projected}, 2, through});
  }
  if (sums) nn<C>(s.k, s.dp, sums->weight.data(), s.dp, {dc, s.rp, 1, h, s.dp, rows}, true);
}

// Rows between tensors and scratch

template <class C, class S> inline const C* load(const S* from, int64_t rows, int64_t d, int64_t dp, C* scratch) {
  if constexpr (std::is_same_v<C, S>)
    if (d == dp) return from;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < d; c++) scratch[i * dp + c] = widen(from[i * d + c]);
  return scratch;
}
// Where to put rows that store will bring to a tensor: there at once, if that is possible
template <class C, class S> inline C* room(S* to, int64_t d, int64_t dp, C* scratch) {
  if constexpr (std::is_same_v<C, S>)
    if (d == dp) return to;
  return scratch;
}
template <class C, class S> inline void store(const C* from, int64_t rows, int64_t d, int64_t dp, S* to) {
  if constexpr (std::is_same_v<C, S>)
    if (from == to) return;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t c = 0; c < d; c++) narrow(from[i * dp + c], to[i * d + c]);
}
// The next block's rows, fetched some lines at a time between the steps of this one: all at once would stall it
class Ahead {
  struct Range { const char *at, *end; bool stored; } ranges[8];
  int count = 0, current = 0;
  int64_t share = 0;

 public:
  template <class S> void start(const Args& a, int64_t t, int64_t tokens, bool backward) {
    const int64_t wide = a.n * a.d * sizeof(S), narrow = a.m * a.d * sizeof(S);
    count = current = 0;
    share = 0;
    if (t + tokens > a.tokens) tokens = a.tokens - t;
    if (tokens <= 0) return;
    auto add = [&](const void* p, int64_t bytes, bool stored) {
      if (!p) return;
      auto at = static_cast<const char*>(p) + t * bytes;
      ranges[count++] = {at, at + tokens * bytes, stored};
      share += tokens * bytes / 64 + 1;
    };
    add(a.state, wide, false);
    add(a.z, narrow, false);
    add(a.grad_x, narrow, false);
    add(a.grad_new, wide, false);
    add(a.new_state, wide, true);
    add(a.x, narrow, true);
    add(a.grad_z, narrow, true);
    add(a.grad_state, wide, true);
    share = share / (tokens * (backward ? 4 : 2)) + 1;
  }
  void fetch() {
    for (int64_t lines = share; lines > 0 && current < count; current++) {
      Range& r = ranges[current];
      const char* const end = r.end - r.at > lines * 64 ? r.at + lines * 64 : r.end;
      lines -= (end - r.at + 63) / 64;
      if (r.stored)
        for (const char* at = r.at; at < end; at += 64) __builtin_prefetch(at, 1, 2);
      else
        for (const char* at = r.at; at < end; at += 64) __builtin_prefetch(at, 0, 2);
      r.at = end;
      if (end < r.end) return;
    }
  }
};
template <class C, class S> inline void round_to(C* x, int64_t size) {
  if constexpr (!std::is_same_v<C, S>)
    for (int64_t i = 0; i < size; i++) { S s; narrow(x[i], s); x[i] = widen(s); }
}

// A block of tokens: the buffers, and the steps that forward and backward share
template <class C, class S> struct Block {
  const Args& a;
  const Side<C>&w, &r;
  int64_t n, m, d, dp, wide, narrow;  // of a token's state and of its X or Z: numbers in scratch
  Routing<C> rw, rr;
  Buffer<C> h_, z_, new_, x_, y_, gn_, gx_, g_, gz_, gh_, dcw, dcr, turned, product, slope, total;  // x_ and y_: of a token
  const C *h, *z, *fresh;
  C rstd = 0;
  Ahead next;

  Block(const Args& a, const Side<C>& w, const Side<C>& r, bool backward)
      : a(a), w(w), r(r), n(a.n), m(a.m), d(a.d), dp(padded<C>(a.d)), wide(n * dp), narrow(m * dp), rw(w), rr(r),
        h_(w.block * wide), z_(w.block * narrow), new_(w.block * wide), x_(narrow), y_(narrow),
        gn_(backward * w.block * wide), gx_(backward * w.block * narrow), g_(backward * w.block * wide),
        gz_(backward * w.block * narrow), gh_(backward * w.block * wide), dcw(backward * w.size),
        dcr(backward * r.size), turned(backward * dp * padded<C>(a.n)), product(backward * n * padded<C>(a.n)),
        slope(w.rp), total(Simd<C>::L) {}

  // Coefficients of token t of the block
  const C* write_coefficients(int64_t t) const { return rw.c + t * n; }
  const C* read_coefficients(int64_t t) const { return rr.c + t * n; }

  // X = A_read^T H' of token t, and with a norm its rounded normalised value in y_
  void read_x(int64_t t, C* x) {
    nn<C>(m, dp, x, dp, {read_coefficients(t), r.rp, 1, fresh + t * wide, dp, n}, false);
    if (!a.norm) return;
    round_to<C, S>(x, narrow);
    row_dots<C>(1, narrow, total, x, 0, x, 0);
    rstd = 1 / std::sqrt(total[0] / (m * d) + C(a.norm_eps));
    for (int64_t c = 0; c < narrow; c++) y_[c] = x[c] * rstd;
    round_to<C, S>(y_, narrow);
  }

  // H' <- A_carry^T H' + B^T Z, rounded as it is stored, in to; then the read's routing
  void run(int64_t first, int64_t tokens, C* to) {
    h = fresh = load<C, S>(static_cast<const S*>(a.state) + first * n * d, tokens * n, d, dp, h_);
    if (w.k) {
      z = load<C, S>(static_cast<const S*>(a.z) + first * m * d, tokens * m, d, dp, z_);
      rw.compute(w, h, tokens * n);
      for (int64_t t = 0; t < tokens; t++) {
        next.fetch();
        const Term<C> carry{write_coefficients(t), w.rp, 1, h + t * wide, dp, n};
        const Term<C> injected{write_coefficients(t) + w.carry * w.rp, 1, w.rp, z + t * narrow, dp, m};
        if (w.carry) nn<C>(n, dp, {to + t * wide, dp, nullptr, nullptr, {carry, injected}, 2});
        else nn<C>(n, dp, {to + t * wide, dp, h + t * wide, nullptr, {injected, {}}, 1});
      }
      round_to<C, S>(to, tokens * wide);
      fresh = to;
    }
    if (r.k) rr.compute(r, fresh, tokens * n);
  }

  void forward(int64_t first, int64_t tokens) {
    const auto new_state = static_cast<S*>(a.new_state) + first * n * d, x = static_cast<S*>(a.x) + first * m * d;
    run(first, tokens, room<C, S>(new_state, d, dp, new_));
    if (w.k) store<C, S>(fresh, tokens * n, d, dp, new_state);
    if (!r.k) return;
    for (int64_t t = 0; t < tokens; t++) {
      C* to = a.norm ? +x_ : room<C, S>(x + t * m * d, d, dp, x_);
      read_x(t, to);
      next.fetch();
      if (a.norm) {
        auto gain = static_cast<const S*>(a.norm);
        for (int64_t s = 0; s < m; s++)
          for (int64_t c = 0; c < d; c++) y_[s * dp + c] *= widen(gain[s * d + c]);
      }
      store<C, S>(a.norm ? +y_ : to, m, d, dp, x + t * m * d);
    }
  }

  // From the gradient of a token's normalised X to that of X
  void norm_backward(const C* g, C* to, std::vector<C>* sums) {
    auto gain = static_cast<const S*>(a.norm);
    for (int64_t s = 0; s < m; s++)
      for (int64_t c = 0; c < d; c++) {
        const int64_t e = s * dp + c;
        if (sums) (*sums)[s * d + c] += g[e] * y_[e];
        to[e] = g[e] * widen(gain[s * d + c]);
      }
    row_dots<C>(1, narrow, total, to, 0, x_, 0);
    const C slope = rstd * rstd * total[0] / (m * d);
    for (int64_t s = 0; s < m; s++)  // not the padding, where a NaN would stay
      for (int64_t e = s * dp; e < s * dp + d; e++) to[e] = rstd * (to[e] - slope * x_[e]);
    round_to<C, S>(to, narrow);
  }

  // out[i][slot] = a_i . b_slot for I rows and the n slots of a token, which may be turned already
  void dots(int64_t I, const Side<C>& s, C* out, const C* a, const C* b, const C* ready) {
    if (2 * n < Simd<C>::L || (!ready && 2 * I < Simd<C>::L)) return nt<C>(I, n, dp, out, s.rp, a, dp, b, dp);
    const int64_t np = padded<C>(n);
    if (!ready) transpose<C>(n, dp, turned, np, b, dp);
    C* to = s.block == 1 ? out : +product;  // beside each other the tokens' rows would not be whole vectors
    nn<C>(I, np, to, np, {a, dp, 1, ready ? ready : +turned, ready ? s.rp : np, d}, false);
    if (s.block > 1)
      for (int64_t i = 0; i < I; i++) std::memcpy(out + i * s.rp, product + i * np, n * sizeof(C));
  }

  void backward(int64_t first, int64_t tokens, Sums<C>* sw, Sums<C>* sr, std::vector<C>* sn) {
    run(first, tokens, new_);
    const auto grad_state = static_cast<S*>(a.grad_state) + first * n * d;
    const C* g = nullptr;
    if (a.grad_new) g = load<C, S>(static_cast<const S*>(a.grad_new) + first * n * d, tokens * n, d, dp, gn_);
    if (r.k) {
      const C* gx = load<C, S>(static_cast<const S*>(a.grad_x) + first * m * d, tokens * m, d, dp, gx_);
      if (a.norm) {
        for (int64_t t = 0; t < tokens; t++) {
          read_x(t, x_);
          norm_backward(gx + t * narrow, gx_ + t * narrow, sn);
        }
        gx = gx_;
      }
      for (int64_t t = 0; t < tokens; t++) {
        dots(m, r, dcr + t * n, gx + t * narrow, fresh + t * wide, r.turns ? rr.turned + t * n : nullptr);
        next.fetch();
      }
      C* to = w.k || g ? +g_ : room<C, S>(grad_state, d, dp, g_);
      routing_backward<C>(r, rr, fresh, dcr, {rr.c, 1, r.rp, gx, dp, m}, to, sr, slope, tokens);
      round_to<C, S>(to, tokens * wide);  // as if the read had stored it, so that fused and separate agree to the bit
      if (g) {
        for (int64_t e = 0; e < tokens * wide; e++) to[e] += g[e];
        round_to<C, S>(to, tokens * wide);
      }
      g = to;
    }
    if (w.k) {
      const auto grad_z = static_cast<S*>(a.grad_z) + first * m * d;
      C* to = room<C, S>(grad_z, d, dp, gz_);
      for (int64_t t = 0; t < tokens; t++) {
        const C* gt = g + t * wide;
        C* dc = dcw + t * n;
        const int64_t beta = w.carry * w.rp;
        if (w.carry) dots(n, w, dc, gt, h + t * wide, w.turns ? rw.turned + t * n : nullptr);
        next.fetch();
        dots(m, w, dc + beta, z + t * narrow, gt, nullptr);
        nn<C>(m, dp, to + t * narrow, dp, {write_coefficients(t) + beta, w.rp, 1, gt, dp, n}, false);
        next.fetch();
      }
      store<C, S>(to, tokens * m, d, dp, grad_z);
      C* gh = room<C, S>(grad_state, d, dp, gh_);
      routing_backward<C>(w, rw, h, dcw, {rw.c, 1, w.rp, g, dp, w.carry}, gh, sw, slope, tokens, w.carry ? nullptr : g);
      g = gh;
    }
    store<C, S>(g, tokens * n, d, dp, grad_state);
  }
};

// Sums over chunks, in their order whatever the threads did, and the gain out of the folded weight
template <class C> void finish(const Side<C>& s, const std::vector<std::unique_ptr<Sums<C>>>& chunks) {
  if (!s.k) return;
  Sums<C> total(s);
  for (auto& chunk : chunks) {
    for (size_t j = 0; j < total.weight.size(); j++) total.weight[j] += chunk->weight[j];
    for (int64_t e = 0; e < s.size; e++) {
      total.stat[e] += chunk->stat[e];
      total.scale[e] += chunk->scale[e];
    }
  }
  const Parameters &w = s.a.weights, &g = s.a.gradients;
  for (int64_t i = 0; i < s.n; i++)
    for (int64_t j = 0; j < s.k; j++) {
      C stat = 0, scale = 0;
      for (int64_t t = 0; t < s.block; t++) {
        stat += total.stat[j * s.rp + t * s.n + i];
        scale += total.scale[j * s.rp + t * s.n + i];
      }
      s.of_slot(g.bias_alpha, g.bias_beta, i, j) = stat;
      if (s.dynamic) s.of_slot(g.scale_alpha, g.scale_beta, i, j) = scale;
    }
  if (!s.dynamic) return;
  const C root = std::sqrt(C(s.d));
  for (int64_t c = 0; c < s.d; c++) {
    C dot = 0;
    for (int64_t j = 0; j < s.k; j++) {
      const C folded = total.weight[j * s.dp + c] / root;
      s.of_weight(g, c, j) = folded * s.gain(w)[c];
      dot += folded * s.of_weight(w, c, j);
    }
    s.gain(g)[c] = dot;
  }
}

// Tokens in a block, by the shapes alone, like the order of the sums; the fewer slots, the more they help each other
inline int64_t block_of(const Args& a) {
  int64_t block = 16 / a.n;
  if (block > a.tokens) block = a.tokens;
  return block < 1 ? 1 : block > 4 ? 4 : block;
}

template <class C, class S> void run(const Args& a, bool backward, bool needs_weights) {
  const int64_t block = block_of(a);
  const Side<C> w(a.write, a, true, block), r(a.read, a, false, block);
  // Chunks depend on the number of tokens alone, so sums are the same for any number of threads.
  const int64_t most = 64, least = 16, wanted = a.tokens / least;
  const int64_t chunks = wanted < 1 ? 1 : wanted > most ? most : wanted;
  std::vector<std::unique_ptr<Sums<C>>> sw(chunks), sr(chunks);
  std::vector<std::vector<C>> sn(chunks);
#pragma omp parallel num_threads(int(a.threads < chunks ? a.threads : chunks))
  {
    Block<C, S> tokens(a, w, r, backward);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      if (needs_weights) {
        sw[chunk] = std::make_unique<Sums<C>>(w);
        sr[chunk] = std::make_unique<Sums<C>>(r);
        sn[chunk].resize(a.norm ? a.m * a.d : 0);
      }
      const int64_t end = a.tokens * (chunk + 1) / chunks;
      for (int64_t t = a.tokens * chunk / chunks; t < end; t += block) {
        const int64_t count = t + block < end ? block : end - t;
        tokens.next.template start<S>(a, t + count, block, backward);
        if (backward)
          tokens.backward(t, count, sw[chunk].get(), sr[chunk].get(), needs_weights ? &sn[chunk] : nullptr);
        else
          tokens.forward(t, count);
      }
    }
  }
  if (!needs_weights) return;
  finish<C>(w, sw);
  finish<C>(r, sr);
  if (a.norm)
    for (int64_t c = 0; c < a.m * a.d; c++) {
      C total = 0;
      for (auto& chunk : sn) total += chunk[c];
      static_cast<C*>(a.grad_norm)[c] = total;
    }
}
