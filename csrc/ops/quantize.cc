#include "ops/quantize.h"

#include <string>

#include "core/error.h"

namespace epmoe::quantize {

void check(const Request &r) {
  if (r.output_dtype != EPMOE_FLOAT8_E4M3FN) {
    fail(EPMOE_ERR_DTYPE, r.output, "float8_e4m3fn (quantization asks for it)", std::string("the dtype of ") + r.input,
         "Pass a float8_e4m3fn output, or quantization 'static'");
  }
  if (r.divisors_given) {
    fail(EPMOE_ERR_UNEXPECTED_ARGUMENT, r.divisors, std::string("nothing: quantization ") + r.ways + " the scales",
         "a tensor", "Leave one of the two out");
  }
  if (r.output_scales == nullptr) {
    fail(EPMOE_ERR_MISSING_ARGUMENT, "output_scales", "a float32 tensor for the scales found", "nothing",
         "Pass output_scales [R, G]");
  }
  if (r.groups != r.expected_groups) {
    fail(EPMOE_ERR_SHAPE, "output_scales", "shape [R, G] with G = " + std::to_string(r.expected_groups),
         "G = " + std::to_string(r.groups), r.one_scale_for);
  }
}

}  // namespace epmoe::quantize
