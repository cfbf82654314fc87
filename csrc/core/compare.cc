// What parity does to every element: seeded data, and the metrics of a comparison.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/float16.h"
#include "core/threads.h"

namespace epmoe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPart = 1 << 16;

struct Float64 {
  using Storage = double;
  static double widen(double x) { return x; }
};

// Whole numbers, as far as a double holds them.
template <typename T, int32_t kType>
struct Whole {
  using Storage = T;
  static constexpr int32_t kDtype = kType;
  static double widen(T x) { return static_cast<double>(x); }
};
template <int32_t kDtype>
constexpr bool kIsWhole = kDtype == EPMOE_INT32 || kDtype == EPMOE_INT64 || kDtype == EPMOE_UINT8;

int64_t count_of(const DLTensor &tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

// The host address of a contiguous CPU tensor.
template <typename T>
T *host_data(const DLTensor *tensor, const char *argument) {
  if (tensor == nullptr) fail(EPMOE_ERR_MISSING_ARGUMENT, argument, "a tensor", "nothing");
  if (tensor->device.device_type != kDLCPU && tensor->device.device_type != kDLCUDAHost) {
    fail(EPMOE_ERR_DEVICE, argument, "a tensor on cpu", "one on another device", "Copy it to the CPU first");
  }
  int64_t expected = 1;
  for (int32_t i = tensor->ndim - 1; tensor->strides != nullptr && i >= 0; --i) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != expected) {
      fail(EPMOE_ERR_NOT_CONTIGUOUS, argument, "row-major contiguous memory", "strides with gaps");
    }
    expected *= tensor->shape[i];
  }
  return reinterpret_cast<T *>(static_cast<char *>(tensor->data) + tensor->byte_offset);
}

template <typename Body>
void with_element(const DLTensor &tensor, const char *argument, const Body &body) {
  switch (dtype_of(tensor.dtype)) {
    case EPMOE_FLOAT32:
      return body(Float32());
    case EPMOE_FLOAT16:
      return body(Float16());
    case EPMOE_BFLOAT16:
      return body(BFloat16());
    case EPMOE_FLOAT8_E4M3FN:
      return body(Float8());
    case EPMOE_INT32:
      return body(Whole<int32_t, EPMOE_INT32>());
    case EPMOE_INT64:
      return body(Whole<int64_t, EPMOE_INT64>());
    case EPMOE_UINT8:
      return body(Whole<uint8_t, EPMOE_UINT8>());
    default:
      fail(EPMOE_ERR_DTYPE, argument, dtype_names(((1u << EPMOE_DTYPE_COUNT) - 1) & ~bit(EPMOE_FLOAT64)),
           dtype_name(tensor.dtype));
  }
}

uint64_t mix(uint64_t x) {  // splitmix64's finaliser: the value of element i depends on the seed and on i alone
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A sum of four uniforms: bell-shaped, mean 0, variance 1.
float bell(uint64_t seed, int64_t i) {
  const uint64_t bits = mix(seed ^ mix(static_cast<uint64_t>(i)));
  const uint64_t sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
  return (static_cast<float>(sum) - 131070.0f) * (1.0f / 37837.22f);
}

template <typename Element>
constexpr int kDigits = Element::kDtype == EPMOE_FLOAT32    ? 24
                        : Element::kDtype == EPMOE_FLOAT16  ? 11
                        : Element::kDtype == EPMOE_BFLOAT16 ? 8
                                                            : 4;
template <typename Element>
constexpr int kMinExponent = Element::kDtype == EPMOE_FLOAT16         ? -13
                             : Element::kDtype == EPMOE_FLOAT8_E4M3FN ? -5
                                                                      : -125;

// One unit in the last place of Element at the magnitude of x.
template <typename Element>
double ulp(double x) {
  if constexpr (kIsWhole<Element::kDtype>) return 1.0;
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent, kMinExponent<Element>) - kDigits<Element>);
}

// A double rounded once to Element.
template <typename Element>
typename Element::Storage round_to(double x) {
  if constexpr (kIsWhole<Element::kDtype> || Element::kDtype == EPMOE_FLOAT32)
    return static_cast<typename Element::Storage>(x);
  else
    return Element::narrow(narrow_to_odd(x));
}

double square_or_infinity(double x) { return x == x ? x * x : kInfinity; }

struct Sums {
  int64_t mismatched = 0;
  double max_ulp = 0, max_abs = 0, error = 0, reference_error = 0, norm = 0;

  void merge(const Sums &other) {
    mismatched += other.mismatched;
    max_ulp = std::max(max_ulp, other.max_ulp);
    max_abs = std::max(max_abs, other.max_abs);
    error += other.error;
    reference_error += other.reference_error;
    norm += other.norm;
  }
};

// Reference is Element itself, or Float64 when the reference is the unrounded truth.
template <typename Element, typename Reference>
Sums compare_part(const typename Element::Storage *actual, const typename Reference::Storage *reference,
                  const double *oracle, const double *scale, int64_t begin, int64_t end) {
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    const double x = Element::widen(actual[i]);
    const double y = Reference::widen(reference[i]);
    const typename Element::Storage rounded = round_to<Element>(y);
    const bool both_nan = x != x && y != y;
    if (!both_nan && std::memcmp(&actual[i], &rounded, sizeof rounded) != 0) ++sums.mismatched;
    if (!both_nan && x != y) {
      const double distance = x - y == x - y ? std::fabs(x - y) : kInfinity;
      sums.max_abs = std::max(sums.max_abs, distance);
      sums.max_ulp = std::max(sums.max_ulp, distance / ulp<Element>(scale[i]));
    }
    const double truth = oracle[i];
    // Where the truth is NaN or infinite there is no error to measure: agreeing is what counts.
    if (!std::isfinite(truth)) {
      if (truth != truth ? x == x : x != truth) sums.error = kInfinity;
      continue;
    }
    sums.error += square_or_infinity(x - truth);
    sums.reference_error += square_or_infinity(Element::widen(rounded) - truth);
    sums.norm += truth * truth;
  }
  return sums;
}

template <typename Element, typename Reference>
void compare_typed(const DLTensor *actual, const DLTensor *reference, const double *oracle, const double *scale,
                   epmoe_metrics *out) {
  const auto *a = host_data<const typename Element::Storage>(actual, "actual");
  const auto *b = host_data<const typename Reference::Storage>(reference, "reference");
  const int64_t count = count_of(*actual);
  std::vector<Sums> parts(static_cast<size_t>((count + kPart - 1) / kPart));
  parallel_for(static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      parts[static_cast<size_t>(part)] =
          compare_part<Element, Reference>(a, b, oracle, scale, part * kPart, std::min(count, (part + 1) * kPart));
    }
  });
  Sums total;
  for (const Sums &part : parts) total.merge(part);  // in order: the sums do not depend on the threads
  const auto relative = [&](double error) { return error == 0 ? 0.0 : std::sqrt(error / total.norm); };
  *out = {
      total.mismatched, count, total.max_ulp, total.max_abs, relative(total.error), relative(total.reference_error)};
}

const double *double_data(const DLTensor *tensor, int64_t count, const char *argument) {
  const auto *data = host_data<const double>(tensor, argument);
  if (dtype_of(tensor->dtype) != EPMOE_FLOAT64) fail(EPMOE_ERR_DTYPE, argument, "float64", dtype_name(tensor->dtype));
  if (count_of(*tensor) != count) {
    fail(EPMOE_ERR_SHAPE, argument, std::to_string(count) + " elements (as actual)", std::to_string(count_of(*tensor)));
  }
  return data;
}

}  // namespace
}  // namespace epmoe

extern "C" epmoe_status epmoe_fill_normal(const DLTensor *tensor, uint64_t seed, double scale) {
  using namespace epmoe;
  return guarded([&] {
    auto *untyped = host_data<void>(tensor, "tensor");
    with_element(*tensor, "tensor", [&](auto element) {
      using Element = decltype(element);
      auto *data = static_cast<typename Element::Storage *>(untyped);
      const uint64_t mixed = mix(seed);
      parallel_for(count_of(*tensor), kPart, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float value = bell(mixed, i) * static_cast<float>(scale);
          if constexpr (kIsWhole<Element::kDtype>)
            data[i] = static_cast<typename Element::Storage>(value);
          else
            data[i] = Element::narrow(value);
        }
      });
    });
  });
}

extern "C" epmoe_status epmoe_compare(const DLTensor *actual, const DLTensor *reference, const DLTensor *oracle,
                                      const DLTensor *scale, epmoe_metrics *out) {
  using namespace epmoe;
  return guarded([&] {
    host_data<const void>(actual, "actual");
    host_data<const void>(reference, "reference");
    const int64_t count = count_of(*actual);
    const double *truth = double_data(oracle, count, "oracle");
    const double *magnitude = double_data(scale, count, "scale");
    if (count_of(*reference) != count) {
      fail(EPMOE_ERR_SHAPE, "reference", std::to_string(count) + " elements (as actual)",
           std::to_string(count_of(*reference)));
    }
    with_element(*actual, "actual", [&](auto element) {
      using Element = decltype(element);
      const int32_t dtype = dtype_of(reference->dtype);
      if (dtype == EPMOE_FLOAT64) return compare_typed<Element, Float64>(actual, reference, truth, magnitude, out);
      if (dtype == Element::kDtype) return compare_typed<Element, Element>(actual, reference, truth, magnitude, out);
      fail(EPMOE_ERR_DTYPE, "reference", dtype_name(actual->dtype) + " (as actual) or float64",
           dtype_name(reference->dtype));
    });
  });
}
