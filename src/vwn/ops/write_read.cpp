// The write of one sublayer and the read of the next on a CPU: either or both, forward and backward (see reference.py).
//
// One pass over the tokens, a block of a few at a time, which stays in the first two cache levels: the routing of the
// block's slots is computed together, the mixes are each token's own. Names: n slots, m segments, d = D / m, dp = d
// padded to whole vectors (in scratch only), k routing columns (read: m; write: n of the carry, none where it is the
// identity, and m of beta). C is the type computed in (float or double), S the type stored.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// Storage types

struct Bf16 { uint16_t bits; };
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(Bf16 v) { uint32_t u = uint32_t(v.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, Bf16& out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u; std::memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out.bits = v != v ? 0x7fc0 : uint16_t(rounded);
}
#ifdef __FLT16_MANT_DIG__
inline float widen(_Float16 v) { return float(v); }
inline void narrow(float v, _Float16& out) { out = _Float16(v); }
#endif

template <class C> struct Buffer {
  explicit Buffer(int64_t size) : p(static_cast<C*>(::operator new[](size * sizeof(C), std::align_val_t(64)))) {
    std::memset(p, 0, size * sizeof(C));
  }
  ~Buffer() { ::operator delete[](p, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  C* p;
  operator C*() const { return p; }
};

// What Python passes: pointers to contiguous tensors, parameters in C. Shapes as in weights.py.
struct Parameters {
  void *bias_alpha, *bias_beta, *dynamic_alpha, *dynamic_beta, *scale_alpha, *scale_beta, *slot_norm;
};
struct SideArgs {
  int64_t present, dynamic, columns;  // columns: of A, m + n, or m where the carry is the identity
  double eps;
  Parameters weights, gradients;  // gradients: zero where this half does not look, or null
};
struct Args {
  int64_t tokens, n, m, d, dtype, threads;
  SideArgs write, read;
  const void* norm;  // D, stored type, or null
  double norm_eps;
  void* grad_norm;  // D, C, or null
  const void *state, *z, *grad_new, *grad_x;  // grad_new may be null
  void *new_state, *x, *grad_state, *grad_z;
};

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__AVX512F__)
#define TILE_ROWS 8  // there are 32 registers
#else
#define TILE_ROWS 6
#endif
namespace longest {
#include "write_read_kernels.h"
}

// Segments of at most eight float leave half of a long vector empty.
#if defined(__AVX512F__)
#undef VECTOR_BYTES
#define VECTOR_BYTES 32
namespace half {
#include "write_read_kernels.h"
}
#else
namespace half = longest;
#endif

}  // namespace

extern "C" int vwn_write_read(const Args* a, int backward, int needs_weights) {
  const bool few = a->d <= 8;
  switch (a->dtype) {
    case 0: (few ? half::run<float, float> : longest::run<float, float>)(*a, backward, needs_weights); return 0;
    case 1: longest::run<double, double>(*a, backward, needs_weights); return 0;
    case 2: (few ? half::run<float, Bf16> : longest::run<float, Bf16>)(*a, backward, needs_weights); return 0;
#ifdef __FLT16_MANT_DIG__
    case 3: (few ? half::run<float, _Float16> : longest::run<float, _Float16>)(*a, backward, needs_weights); return 0;
#endif
  }
  return 1;
}
