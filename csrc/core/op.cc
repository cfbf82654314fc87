#include "core/op.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>

namespace epmoe {
namespace {

// Filled by static initialisers, whose order across files is unknown: hence functions, and a table built on first use.
std::vector<const Op *> &registered_ops() {
  static std::vector<const Op *> ops;
  return ops;
}
std::map<std::string, CudaLaunch> &registered_cuda() {
  static std::map<std::string, CudaLaunch> launches;
  return launches;
}

int16_t axis_index(const OpEntry &entry, const std::string &name) {
  const auto found = std::find(entry.axis_names.begin(), entry.axis_names.end(), name);
  if (found == entry.axis_names.end()) throw std::logic_error("axis " + name + " is not declared");
  return static_cast<int16_t>(found - entry.axis_names.begin());
}

std::vector<std::string> split(const std::string &text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + 1) {
    parts.push_back(text.substr(begin, end - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

std::vector<ShapePattern> parse_shape(const OpEntry &entry, const char *text) {
  std::vector<ShapePattern> alternatives;
  for (const std::string &alternative : split(text, '|')) {
    ShapePattern pattern;
    for (std::string axis : split(alternative, ',')) {
      AxisPattern parsed;
      if (axis.rfind("...", 0) == 0) {
        parsed.folds_leading = true;
        axis = axis.substr(3);
      }
      const std::vector<std::string> terms = split(axis, '+');
      if (terms.size() == 2) parsed.addend = static_cast<int16_t>(std::stoi(terms[1]));
      int named = 0;
      for (const std::string &factor : split(terms[0], '*')) {
        if (std::isdigit(static_cast<unsigned char>(factor[0])))
          parsed.factor = static_cast<int16_t>(std::stoi(factor));
        else if (named < 2)
          parsed.names[named++] = axis_index(entry, factor);
        else
          throw std::logic_error("shape pattern with more than two names");
      }
      pattern.push_back(parsed);
    }
    alternatives.push_back(std::move(pattern));
  }
  return alternatives;
}

using Table = std::vector<std::unique_ptr<OpEntry>>;

Table build_table() {
  std::vector<const Op *> ops = registered_ops();
  std::sort(ops.begin(), ops.end(), [](const Op *a, const Op *b) { return std::strcmp(a->name, b->name) < 0; });
  Table table;
  for (const Op *op : ops) {
    auto entry = std::make_unique<OpEntry>();
    entry->op = op;
    entry->index = static_cast<int32_t>(table.size());
    entry->axis_names.assign(op->axes.begin(), op->axes.end());
    const auto cuda = registered_cuda().find(op->name);
    if (cuda != registered_cuda().end()) entry->run_cuda = cuda->second;
    for (const epmoe_param &param : op->params) {
      entry->shapes.push_back(param.kind == EPMOE_KIND_TENSOR ? parse_shape(*entry, param.shape)
                                                              : std::vector<ShapePattern>());
    }
    // A descriptor is source code: one that does not fit must not survive the first start of a build.
    if (op->params.size() > kMaxParams || entry->axis_names.size() > kMaxAxes) std::abort();
    entry->info = {op->name, op->doc, op->params.data(), static_cast<int32_t>(op->params.size()),
                   entry->run_cuda != nullptr};
    table.push_back(std::move(entry));
  }
  return table;
}

const Table &table() {
  static const Table *built = new Table(build_table());  // never destroyed: callers keep pointers until exit
  return *built;
}

epmoe_param blank(const char *name, const char *doc, int32_t kind) {
  epmoe_param param{};
  param.name = name;
  param.doc = doc;
  param.kind = kind;
  param.dtype_like = -1;
  param.shape = "";
  return param;
}

}  // namespace

epmoe_param tensor_in(const char *name, const char *shape, uint32_t dtypes, const char *doc, int32_t dtype_like) {
  epmoe_param param = blank(name, doc, EPMOE_KIND_TENSOR);
  param.shape = shape;
  param.dtypes = dtypes;
  param.dtype_like = dtype_like;
  return param;
}

epmoe_param tensor_out(const char *name, const char *shape, uint32_t dtypes, const char *doc, int32_t dtype_like) {
  epmoe_param param = tensor_in(name, shape, dtypes, doc, dtype_like);
  param.role = EPMOE_ROLE_OUT;
  return param;
}

epmoe_param integer(const char *name, double default_value, double min_value, double max_value, const char *doc) {
  epmoe_param param = blank(name, doc, EPMOE_KIND_INT);
  param.optional = 1;
  param.default_value = default_value;
  param.min_value = min_value;
  param.max_value = max_value;
  return param;
}

epmoe_param real(const char *name, double default_value, const char *doc) {
  epmoe_param param = blank(name, doc, EPMOE_KIND_FLOAT);
  param.optional = 1;
  param.default_value = default_value;
  // Kernels compute with it in float32; what does not fit there would silently become infinite.
  param.min_value = -3.4028234663852886e38;
  param.max_value = 3.4028234663852886e38;
  return param;
}

epmoe_param choice(const char *name, const char *const *choices, int32_t n_choices, const char *doc) {
  epmoe_param param = blank(name, doc, EPMOE_KIND_ENUM);
  param.optional = 1;
  param.choices = choices;
  param.n_choices = n_choices;
  param.max_value = n_choices - 1;
  return param;
}

epmoe_param optional(epmoe_param param) {
  param.optional = 1;
  return param;
}

RegisterOp::RegisterOp(const Op *op) { registered_ops().push_back(op); }

RegisterCuda::RegisterCuda(const char *name, CudaLaunch launch) { registered_cuda()[name] = launch; }

const OpEntry *find_entry(const epmoe_op_info *info) {
  for (const auto &entry : table()) {
    if (&entry->info == info) return entry.get();
  }
  return nullptr;
}

const OpEntry *entry_at(int32_t index) {
  return index >= 0 && static_cast<size_t>(index) < table().size() ? table()[index].get() : nullptr;
}

}  // namespace epmoe

extern "C" int32_t epmoe_op_count(void) { return static_cast<int32_t>(epmoe::table().size()); }

extern "C" const epmoe_op_info *epmoe_op_at(int32_t index) {
  const epmoe::OpEntry *entry = epmoe::entry_at(index);
  return entry ? &entry->info : nullptr;
}

extern "C" const epmoe_op_info *epmoe_op_find(const char *name) {
  for (const auto &entry : epmoe::table()) {
    if (name != nullptr && std::strcmp(entry->op->name, name) == 0) return &entry->info;
  }
  return nullptr;
}
