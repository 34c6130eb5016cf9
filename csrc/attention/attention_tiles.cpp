// The table of tiles for Python: `vlmkernels info --verbose`.
#include "attention/attention_tiles.h"

#include "binding/device.h"

namespace vlmkernels {

static const char* name(FwdCase which) {
    switch (which) {
        case FwdCase::kFull: return "full";
        case FwdCase::kCausal: return "causal";
        case FwdCase::kShort: return "short";
        default: return "masked";
    }
}

// Of each row: what it is for, and its tile.
static py::list attention_tiles() {
    using py::literals::operator""_a;
    py::list rows;
    for (const AttentionFwdChoice& t : kAttentionFwdTable)
        rows.append(py::dict("columns"_a = t.tile_dim, "kernel"_a = "forward",
                             "mask"_a = name(t.which), "warpgroups"_a = t.consumers,
                             "queries"_a = 64 * t.consumers, "keys"_a = t.keys,
                             "stages"_a = t.stages));
    for (const AttentionBwdChoice& t : kAttentionBwdTable) {
        const bool keys = t.side == BwdSide::kKeys;
        rows.append(py::dict("columns"_a = t.tile_dim, "kernel"_a = keys ? "dk, dv" : "dq",
                             "mask"_a = t.masked ? "masked" : "full, causal",
                             "warpgroups"_a = t.consumers * (keys && t.tile_dim > 128 ? 2 : 1),
                             "queries"_a = keys ? t.rows : 64 * t.consumers,
                             "keys"_a = keys ? 64 * t.consumers : t.rows, "stages"_a = t.stages));
    }
    for (const AttentionDbiasChoice& t : kAttentionDbiasTable)
        rows.append(py::dict("columns"_a = t.tile_dim, "kernel"_a = "dbias", "mask"_a = "masked",
                             "warpgroups"_a = t.consumers, "queries"_a = 64 * t.consumers,
                             "keys"_a = t.keys, "stages"_a = t.stages));
    return rows;
}

static const Binding binding([](py::module_& m) { m.def("attention_tiles", &attention_tiles); });

}  // namespace vlmkernels
