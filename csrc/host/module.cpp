// The host module: known answers of the kernels' own code, without torch.
#include <pybind11/pybind11.h>

#include "../noise/arguments.h"
#include "../reward_pixels/tables.h"

namespace py = pybind11;
namespace resizing = diffpp::reward_pixels;

namespace {

// The four words of one Philox4x32-10 block, by the kernels' own code.
py::tuple philox4x32(const py::tuple& counter, const py::tuple& key) {
  if (counter.size() != 4 || key.size() != 2)
    throw py::value_error("philox4x32: counter must have 4 words and key 2");
  const auto word = [](const py::handle& value) { return static_cast<uint64_t>(value.cast<uint32_t>()); };
  uint32_t words[4];
  const diffpp::noise::Block block{
      .index = word(counter[0]),
      .stream = static_cast<uint32_t>(word(counter[1])),
      .sample = word(counter[2]) | word(counter[3]) << 32,
      .seed = word(key[0]) | word(key[1]) << 32,
      .words = words};
  // One block needs no threads.
  diffpp::noise::cpu::philox_block(block, diffpp::Pool{});
  return py::make_tuple(words[0], words[1], words[2], words[3]);
}

// The rows of a resize, as the kernels have them: first input pixel, number of pixels, weights.
py::tuple axis_table(
    int64_t in_size, int64_t other_in_size, int64_t size, const std::string& fit, const std::string& filter,
    bool antialias) {
  const auto chosen_fit = resizing::fit_named(fit);
  const auto chosen_filter = resizing::filter_named(filter);
  if (!chosen_fit) throw py::value_error("axis_table: unknown fit '" + fit + "'; known: crop, pad, stretch");
  if (!chosen_filter) throw py::value_error("axis_table: unknown filter '" + filter + "'; known: bilinear, bicubic");
  if (in_size < 1 || other_in_size < 1 || size < 1) throw py::value_error("axis_table: sizes must be at least 1");
  const resizing::AxisTable table =
      resizing::axis_table({in_size, other_in_size, size, *chosen_fit, *chosen_filter, antialias});
  py::list first, count, weights;
  for (int64_t o = 0; o < table.out; ++o) {
    py::list row;
    for (int64_t k = 0; k < table.count[o]; ++k) row.append(table.weights[o * table.taps + k]);
    first.append(table.first[o]);
    count.append(table.count[o]);
    weights.append(row);
  }
  return py::make_tuple(first, count, weights);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Known answers and resize tables of csrc.";
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
        "Four 32-bit words of the block with this counter (4 words) and key (2 words).");
  m.def("axis_table", &axis_table, py::arg("in_size"), py::arg("other_in_size"), py::arg("size"), py::arg("fit"),
        py::arg("filter"), py::arg("antialias"),
        "(first, count, weights) of the rows of a resize: row o sums weights[o][k] times pixel first[o] + k.");
}
