// pybind11 module forge_core.kernels._data: the torch-free data plane for NumPy arrays.
// kernels/pack.py checks types and documents; here arrays come in as contiguous int64 / int32.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "data/mixer.h"
#include "data/pack_plan.h"
#include "data/pack_tree.h"
#include "data/packer.h"

namespace py = pybind11;
using namespace forge::data_plane;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

// Hands a vector's memory to NumPy without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>({static_cast<py::ssize_t>(kept->size())}, {sizeof(T)}, kept->data(), owner);
}

py::tuple to_tuple(Packs&& packs) {
  return py::make_tuple(to_numpy(std::move(packs.order)), to_numpy(std::move(packs.offsets)));
}

py::array_t<std::int32_t> tiles_to_numpy(const std::vector<Tile>& tiles) {
  constexpr py::ssize_t columns = sizeof(Tile) / sizeof(std::int32_t);
  py::array_t<std::int32_t> result({static_cast<py::ssize_t>(tiles.size()), columns});
  if (!tiles.empty()) {
    std::copy_n(&tiles.front().document, tiles.size() * columns, result.mutable_data());
  }
  return result;
}

py::array_t<std::int32_t> make_tiles(const Int32Array& cu_seqlens, std::int32_t row_tile, std::int32_t col_tile,
                                     bool causal, std::int32_t window, bool backward, std::int64_t tokens) {
  const std::int32_t* offsets = cu_seqlens.data();
  const std::int64_t documents = cu_seqlens.size() - 1;
  const TileOptions options{row_tile, col_tile, causal, window, tokens};
  std::vector<Tile> tiles;
  {
    const py::gil_scoped_release release;
    tiles = backward ? backward_tiles(offsets, documents, options) : forward_tiles(offsets, documents, options);
  }
  return tiles_to_numpy(tiles);
}

// (tiles, context) of a pack whose documents continue others; see data/pack_tree.h.
py::tuple make_tree_tiles(const Int32Array& cu_seqlens, const Int32Array& parents, std::int32_t row_tile,
                          std::int32_t col_tile, std::int32_t window, bool backward, std::int64_t tokens) {
  const std::int32_t *offsets = cu_seqlens.data(), *parent = parents.data();
  const std::int64_t documents = parents.size();
  TreeTiles made;
  {
    const py::gil_scoped_release release;
    const PackTree tree(offsets, parent, documents);
    const TileOptions options{row_tile, col_tile, true, window, tokens};
    made = backward ? backward_tiles(tree, options) : forward_tiles(tree, options);
  }
  return py::make_tuple(tiles_to_numpy(made.tiles), to_numpy(std::move(made.context)));
}

}  // namespace

PYBIND11_MODULE(_data, m) {
  m.doc() = "Torch-free data plane: packing, blending, attention tiles. Use forge_core.kernels.pack.";

  m.def(
      "pack_sequences",
      [](const Int64Array& lengths, std::int64_t budget) {
        const std::int64_t* data = lengths.data();
        const std::int64_t count = lengths.size();
        Packs packs;
        {
          const py::gil_scoped_release release;
          packs = pack_sequences(data, count, budget);
        }
        return to_tuple(std::move(packs));
      },
      py::arg("lengths").noconvert(), py::arg("budget"));

  m.def(
      "pack_step",
      [](const Int64Array& lengths, std::int64_t budget, std::int64_t max_packs) {
        const std::int64_t* data = lengths.data();
        const std::int64_t count = lengths.size();
        Packs packs;
        {
          const py::gil_scoped_release release;
          packs = pack_step(data, count, budget, max_packs);
        }
        return to_tuple(std::move(packs));
      },
      py::arg("lengths").noconvert(), py::arg("budget"), py::arg("max_packs"));

  m.def(
      "random_permutation",
      [](std::int64_t count, const std::vector<std::uint64_t>& key) {
        std::vector<std::int64_t> order;
        {
          const py::gil_scoped_release release;
          order = random_permutation(count, key);
        }
        return to_numpy(std::move(order));
      },
      py::arg("count"), py::arg("key"));

  m.def("make_tiles", &make_tiles, py::arg("cu_seqlens").noconvert(), py::arg("row_tile"), py::arg("col_tile"),
        py::arg("causal"), py::arg("window"), py::arg("backward"), py::arg("tokens"));

  m.def("make_tree_tiles", &make_tree_tiles, py::arg("cu_seqlens").noconvert(), py::arg("parents").noconvert(),
        py::arg("row_tile"), py::arg("col_tile"), py::arg("window"), py::arg("backward"), py::arg("tokens"));

  py::class_<TokenMixer>(m, "TokenMixer")
      .def(py::init<const std::vector<double>&, std::uint64_t>(), py::arg("shares"), py::arg("seed"))
      .def(
          "draw",
          [](TokenMixer& mixer, const std::vector<Int64Array>& lengths, std::int64_t max_draws,
             std::int64_t max_tokens) {
            std::vector<TokenMixer::Upcoming> sources;
            sources.reserve(lengths.size());
            for (const Int64Array& source : lengths) sources.push_back({source.data(), source.size()});
            // The GIL stays held: it is what keeps two threads from drawing at once, and a draw is microseconds.
            return to_numpy(mixer.draw(sources, max_draws, max_tokens));
          },
          py::arg("lengths"), py::arg("max_draws"), py::arg("max_tokens"))
      .def_property_readonly("drawn", [](const TokenMixer& mixer) { return mixer.drawn(); })
      .def("restore", &TokenMixer::restore, py::arg("drawn"));
}
