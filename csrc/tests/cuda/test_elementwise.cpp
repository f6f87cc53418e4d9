// threshold and scale_pruned_grad against formulas in long double: dtypes, powers, sizes, alignments, in place.
#include <string.h>

#include <stdexcept>

#include "cuda/ops.h"
#include "tests/cuda/arrays.h"
#include "tests/cuda/tests.h"

namespace feather {
namespace {

constexpr double kPowers[] = {1, 2, 3, INFINITY};
constexpr double kThresholds[] = {0.3, 1.9999, 1e-30, 0.0, -1.0, NAN, INFINITY};
constexpr int64_t kSizes[] = {0, 1, 5, 31, 517, 3001};

long double exact(double w, double t, double p) {
  const long double a = fabsl(w), b = t;
  if (t <= 0 || isnan(w)) return w;
  if (isnan(t)) return t;
  if (a <= b) return 0;
  if (isinf(w) || isinf(p)) return w;
  long double y = a - b;
  if (p == 2) y = sqrtl((a - b) * (a + b));
  if (p == 3) y = cbrtl((a - b) * (a * (a + b) + b * b));
  return w < 0 ? -y : y;
}

// The distance between neighbouring numbers of type W at a value.
template <class W>
long double ulp_at(long double value) {
  const int mantissa = sizeof(W) == 8 ? 52 : sizeof(W) == 4 ? 23 : std::is_same_v<W, Half> ? 10 : 7;
  const int least = sizeof(W) == 8 ? -1022 : std::is_same_v<W, Half> ? -14 : -126;
  const int exponent = value == 0 ? least : ilogbl(value);
  return ldexpl(1, (exponent < least ? least : exponent) - mantissa);
}

template <class W, class Out>
void check_value(W w, Out out, double t, double p, int64_t i) {
  using T = Compute<W>;
  const double weight = value_of(w), y = value_of(out);
  const long double wanted = exact(weight, t, p);
  const char *from = name_of<W>(), *to = name_of<Out>();
  if (isnan(wanted) || wanted == 0) {
    const bool same = isnan(wanted) ? isnan(y) : y == 0 && (t <= 0 || !signbit(y));
    expect(same, "threshold %s -> %s p=%g T=%g: P(%a) = %a, element %ld", from, to, p, t, weight, y, i);
    return;
  }
  constexpr bool kRounded = sizeof(Out) < sizeof(T);  // from the compute type
  const long double ulp = kRounded ? ulp_at<Out>(wanted) : ulp_at<T>(wanted);
  const bool computed = t > 0 && !isinf(p);  // else w is copied, exactly but for the conversion
  const long double bound = computed ? (kRounded ? 0.55L : 2.0L) : (kRounded ? 0.5L : 0.0L);
  long double most = 1.7e308L;  // the largest number of the narrower of the two types
  if (sizeof(T) == 4 || sizeof(Out) < 8) most = 3.4e38L;
  if (std::is_same_v<Out, Half>) most = 65504.0L;
  if (fabsl(wanted) > most) {  // rounding decides between the largest number and infinity
    expect(fabs(y) >= most * 0.99L, "threshold %s -> %s: P(%a) = %a", from, to, weight, y);
    return;
  }
  expect(fabsl(y - wanted) <= bound * ulp && signbit(y) == signbit(weight),
         "threshold %s -> %s p=%g T=%g: P(%a) = %a, %Lg ulp, element %ld", from, to, p, t, weight, y,
         (y - wanted) / ulp, i);
}

template <class W, class Out>
void check_threshold(int64_t n, double t, double p, int64_t w_offset, int64_t out_offset, unsigned seed) {
  using T = Compute<W>;
  const Array<W> w(n, w_offset);
  const Array<Out> out(n, out_offset);
  const Array<T> bound(1);
  bound[0] = static_cast<T>(t);
  fill(w, t > 0 && t < 1e30 ? t : 0.5, seed);
  cuda::threshold(w.data(), dtype_of<W>(), bound.data(), p, out.data(), dtype_of<Out>(), n, nullptr);
  for (int64_t i = 0; i < n; ++i) check_value(w[i], out[i], static_cast<double>(bound[0]), p, i);
}

template <class W>
void check_threshold_in_place(int64_t n) {
  using T = Compute<W>;
  const Array<W> w(n, 1), before(n);
  const Array<T> bound(1);
  bound[0] = T(0.25);
  fill(w, 0.25, 7);
  memcpy(before.data(), w.data(), static_cast<size_t>(n) * sizeof(W));
  cuda::threshold(w.data(), dtype_of<W>(), bound.data(), 3, w.data(), dtype_of<W>(), n, nullptr);
  for (int64_t i = 0; i < n; ++i) check_value(before[i], w[i], 0.25, 3, i);
}

template <class W, class Out>
void check_thresholds(unsigned seed) {
  for (const double p : kPowers) {
    for (const double t : kThresholds) {
      if (t < 1e-5 && sizeof(W) == 2 && t > 0) continue;
      check_threshold<W, Out>(517, t, p, 0, 0, seed);
    }
  }
  for (const int64_t n : kSizes) {
    check_threshold<W, Out>(n, 0.3, 3, 0, 0, seed);
    check_threshold<W, Out>(n, 0.3, 3, 1, 1, seed);  // aligned from some element on, where the sizes agree
    check_threshold<W, Out>(n, 0.3, 3, 0, 1, seed);  // never
  }
}

template <class G, class W, class Out>
void check_scale(int64_t n, double t, int64_t offset, bool in_place) {
  using T = Compute<W>;
  using Product = decltype(Compute<G>() * T());
  const Array<G> g(n, offset);
  const Array<W> w(n, offset);
  const Array<Out> separate(n, offset);
  const Array<T> bound(1), scale(1);
  bound[0] = static_cast<T>(t);
  scale[0] = T(0.3);
  fill(g, 1.0, 3);
  fill(w, t > 0 ? t : 0.5, 4);
  std::vector<Out> wanted;
  for (int64_t i = 0; i < n; ++i) {
    const bool pruned = t > 0 && std::fabs(value_of(w[i])) <= static_cast<double>(bound[0]);
    const Product value = load<Product>(g[i]);
    wanted.emplace_back();
    store(wanted.back(), pruned ? value * static_cast<Product>(scale[0]) : value);
  }
  Out* out = in_place ? reinterpret_cast<Out*>(g.data()) : separate.data();
  cuda::scale_pruned_grad(g.data(), dtype_of<G>(), w.data(), dtype_of<W>(), bound.data(), scale.data(), out,
                          dtype_of<Out>(), n, nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const double y = value_of(out[i]), should = value_of(wanted[static_cast<size_t>(i)]);
    expect((isnan(y) && isnan(should)) || (y == should && signbit(y) == signbit(should)),
           "scale %s, %s -> %s T=%g: %a instead of %a, element %ld of %ld", name_of<G>(), name_of<W>(), name_of<Out>(),
           t, y, should, i, n);
  }
}

template <class G, class W, class Out>
void check_scales() {
  for (const int64_t n : kSizes) {
    check_scale<G, W, Out>(n, 0.3, 0, false);
    check_scale<G, W, Out>(n, 0.3, 1, false);
    if (std::is_same_v<G, Out>) check_scale<G, W, Out>(n, 0.3, 3, true);
  }
  check_scale<G, W, Out>(99, NAN, 0, false);
  check_scale<G, W, Out>(99, -1.0, 0, false);
}

// The op must throw std::invalid_argument with these words, before any launch.
template <class Op>
void check_refused(const char* words, const Op& op) {
  try {
    op();
    expect(false, "no error that says \"%s\"", words);
  } catch (const std::invalid_argument& error) {
    expect(strcmp(error.what(), words) == 0, "\"%s\" instead of \"%s\"", error.what(), words);
  }
}

}  // namespace

void test_elementwise_once() {
  check_threshold_in_place<float>(1003);
  check_threshold<float, BFloat16>(517, 0.3, 3, 1, 1, 5);
  check_scale<float, float, float>(517, 0.3, 1, true);
}

void test_threshold() {
  check_thresholds<float, float>(1);
  check_thresholds<float, BFloat16>(2);
  check_thresholds<float, Half>(3);
  check_thresholds<BFloat16, BFloat16>(4);
  check_thresholds<Half, Half>(5);
  check_thresholds<double, double>(6);
  check_threshold_in_place<float>(1003);
  check_threshold_in_place<BFloat16>(1003);
  check_threshold_in_place<Half>(1003);
  check_threshold_in_place<double>(1003);
  const Array<float> w(4);
  check_refused("threshold has no kernel for the dtype codes 2 3", [&] {
    cuda::threshold(w.data(), DType::kFloat32, w.data(), 3, w.data(), DType::kFloat64, 1, nullptr);
  });
  check_refused("power must be 1, 2, 3 or inf, got 4.5", [&] {
    cuda::threshold(w.data(), DType::kFloat32, w.data(), 4.5, w.data(), DType::kFloat32, 1, nullptr);
  });
}

void test_scale() {
  check_scales<float, float, float>();
  check_scales<BFloat16, float, float>();
  check_scales<Half, float, float>();
  check_scales<BFloat16, float, BFloat16>();
  check_scales<Half, float, Half>();
  check_scales<BFloat16, BFloat16, BFloat16>();
  check_scales<Half, Half, Half>();
  check_scales<double, double, double>();
  const Array<double> g(4);
  check_refused("scale_pruned_grad has no kernel for the dtype codes 3 2 2", [&] {
    cuda::scale_pruned_grad(g.data(), DType::kFloat64, g.data(), DType::kFloat32, g.data(), g.data(), g.data(),
                            DType::kFloat32, 1, nullptr);
  });
}

}  // namespace feather
