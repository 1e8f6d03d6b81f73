// cdfast_kernels._C. Buffers come as addresses: layout.py and cpu_ops.py own the tensors and check
// shapes, dtypes and strides; this file knows numpy arrays only where it makes them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "alignment.h"
#include "attention.h"
#include "layout.h"

namespace py = pybind11;

namespace cdfast {
namespace {

bool runs_here(const std::string& isa) {
#if defined(CDFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == "portable";
}

const Kernels* kernels_of(const std::string& isa) {
#if defined(CDFAST_X86)
  if (isa == "avx512") return &avx512_kernels();
  if (isa == "avx2") return &avx2_kernels();
#endif
  return &portable_kernels();
}

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (runs_here(isa)) names.emplace_back(isa);
  }
  return names;
}

const Kernels*& chosen() {
  static const Kernels* kernels = kernels_of(supported().front());
  return kernels;
}

void use_isa(const std::string& isa) {
  if (!runs_here(isa)) {
    std::string known;
    for (const std::string& name : supported()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("expected one of " + known + ", got " + isa);
  }
  chosen() = kernels_of(isa);
}

template <typename T>
T* address(uintptr_t at) {
  return reinterpret_cast<T*>(at);
}

// (address, sample stride, token stride, head stride, dtype)
using ViewArguments = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;

View view_of(const ViewArguments& v) {
  return {address<void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v),
          static_cast<DType>(std::get<4>(v))};
}

// sizes: n_samples, n_tokens, n_slots, n_tiles, map_rows, length (0 if packed); tables: addresses
// of samples, codes, bounds, tiles, entries, counts, slot_tiles, panels.
Axis axis_of(const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& tables) {
  if (sizes.size() != 6 || tables.size() != 8) throw std::invalid_argument("axis");
  Axis axis;
  axis.n_samples = sizes[0];
  axis.n_tokens = sizes[1];
  axis.n_slots = sizes[2];
  axis.n_tiles = sizes[3];
  axis.map_rows = sizes[4];
  axis.length = sizes[5];
  axis.samples = address<const int32_t>(tables[0]);
  axis.codes = address<const int32_t>(tables[1]);
  axis.bounds = address<const int32_t>(tables[2]);
  axis.tiles = address<const int64_t>(tables[3]);
  axis.entries = address<const int32_t>(tables[4]);
  axis.counts = address<const int64_t>(tables[5]);
  axis.slot_tiles = address<const int32_t>(tables[6]);
  axis.panels = address<const int64_t>(tables[7]);
  return axis;
}

Problem problem_of(const Axis& axis, int64_t heads, int64_t kv_heads, int64_t dim, double scale,
                   int threads) {
  Problem p;
  p.axis = axis;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.scale = static_cast<float>(scale);
  p.threads = threads < 1 ? 1 : threads;
  return p;
}

void set_view(Problem& p, const std::string& name, const ViewArguments& view) {
  View Problem::* member = name == "q"       ? &Problem::q
                           : name == "k"     ? &Problem::k
                           : name == "v"     ? &Problem::v
                           : name == "out"   ? &Problem::out
                           : name == "d_out" ? &Problem::d_out
                           : name == "dq"    ? &Problem::dq
                           : name == "dk"    ? &Problem::dk
                           : name == "dv"    ? &Problem::dv
                                             : nullptr;
  if (member == nullptr) throw std::invalid_argument("no view " + name);
  p.*member = view_of(view);
}

void set_rows(Problem& p, const std::string& name, uintptr_t at) {
  if (name == "lse") {
    p.lse = address<float>(at);
  } else if (name == "d_lse") {
    p.d_lse = address<const float>(at);
  } else if (name == "delta") {
    p.delta = address<float>(at);
  } else if (name == "norm") {
    p.norm = address<float>(at);
  } else if (name == "map") {
    p.map = address<float>(at);
  } else if (name == "d_loss") {
    p.d_loss = address<const float>(at);
  } else {
    throw std::invalid_argument("no rows " + name);
  }
}

template <typename T>
py::array_t<T> array(std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape));
}

template <typename T, typename Stored = T>
Stored* data(py::array_t<T>& x) {
  return reinterpret_cast<Stored*>(x.mutable_data());
}

// All tables of a layout by name, or None if the segment ids are negative or decrease.
py::object layout_tables(int64_t n_samples, int64_t length, int64_t n_tokens, uintptr_t visual,
                         uintptr_t live, uintptr_t segment, uintptr_t starts) {
  Tokens tokens = {n_samples,
                   length,
                   n_tokens,
                   address<const uint8_t>(visual),
                   address<const uint8_t>(live),
                   address<const int64_t>(segment),
                   address<const int64_t>(starts)};
  auto out_live = array<bool>({n_samples, length}), out_visual = array<bool>({n_samples, length});
  auto out_segment = array<int64_t>({n_samples, length});
  const bool packed = starts != 0;
  auto gather = array<int64_t>({packed ? n_samples : 0, packed ? length : 0});
  auto scatter = array<int64_t>({packed ? n_tokens : 0});
  auto start = array<int64_t>({n_samples}), counts = array<int64_t>({n_samples, 2});
  auto image_samples = array<bool>({n_samples});
  auto samples = array<int32_t>({n_samples, 5});
  auto codes = array<int32_t>({n_tokens}), entries = array<int32_t>({n_tokens});
  auto bounds = array<int32_t>({n_tokens, 2});
  const LayoutTables to = {data<bool, uint8_t>(out_live),
                           data<bool, uint8_t>(out_visual),
                           data(out_segment),
                           packed ? data(gather) : nullptr,
                           packed ? data(scatter) : nullptr,
                           data(start),
                           data<bool, uint8_t>(image_samples),
                           data(samples),
                           data(counts),
                           data(codes),
                           data(bounds),
                           data(entries)};
  LayoutFacts facts;
  {
    const py::gil_scoped_release release;
    facts = build_layout(tokens, to);
  }
  if (!facts.segments_ordered) return py::none();
  auto slot_tiles = array<int32_t>({n_samples, facts.n_slots});
  auto panels = array<int64_t>({n_samples, facts.n_slots, 3});
  auto tiles = array<int64_t>({n_samples, facts.n_tiles, 3});
  write_slots(facts, start.data(), n_samples, data(slot_tiles), data(panels), data(tiles));
  py::dict result;
  result["live"] = out_live;
  result["visual"] = out_visual;
  result["segment"] = out_segment;
  result["start"] = start;
  result["slot_tiles"] = slot_tiles;
  result["panels"] = panels;
  result["image_samples"] = image_samples;
  result["gather"] = packed ? py::object(gather) : py::none();
  result["scatter"] = packed ? py::object(scatter) : py::none();
  result["samples"] = samples;
  result["codes"] = codes;
  result["bounds"] = bounds;
  result["tiles"] = tiles;
  result["entries"] = entries;
  result["counts"] = counts;
  result["map_rows"] = facts.map_rows;
  result["num_image_samples"] = facts.num_image_samples;
  result["contiguous"] = facts.contiguous;
  result["is_causal"] = !packed && facts.one_segment && facts.all_live;
  result["is_prefix_causal"] = !packed && facts.one_segment && facts.padded_right;
  return result;
}

}  // namespace
}  // namespace cdfast

PYBIND11_MODULE(_C, m) {
  using namespace cdfast;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.doc() = "Host scheduler and CPU kernels of cdfast_kernels.";
  m.def("isa", [] { return std::string(chosen()->name); }, "The instruction set in use.");
  m.def("supported_isas", &supported, "Instruction sets that this machine runs, the best first.");
  m.def("use_isa", &use_isa, py::arg("isa"), "Use this one; ValueError if it cannot run here.");
  m.def("layout_tables", &layout_tables);

  py::class_<Axis>(m, "Axis").def(py::init(&axis_of), py::arg("sizes"), py::arg("tables"));
  py::class_<Problem>(m, "Problem")
      .def(py::init(&problem_of), py::arg("axis"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("dim"), py::arg("scale"), py::arg("threads"))
      .def("view", &set_view)
      .def("rows", &set_rows)
      .def_readwrite("modular", &Problem::modular);

  m.def("attention_forward", [](const Problem& p) { attention_forward(p, *chosen()); }, unlocked);
  m.def("attention_backward", [](const Problem& p) { attention_backward(p, *chosen()); }, unlocked);
  m.def("map_forward", [](const Problem& p) { map_forward(p, *chosen()); }, unlocked);
  m.def(
      "alignment",
      [](const Axis& axis, int objective, uintptr_t map, uintptr_t target, uintptr_t loss,
         int threads) {
        alignment(axis, static_cast<Objective>(objective), address<float>(map),
                  address<const float>(target), address<float>(loss), threads);
      },
      unlocked);
}
