// What one selection launch reads, and the arithmetic of rows, cells and blocks. Mirrored by elastic/kernels/params.py.
// A row is kStride queries of a sample, a cell kStride of its keys, both counted from the sample's first token; row i
// sees the cells that begin at or before its last query. A tile is 128 rows of one query head; it walks key tiles of
// 256 cells. Compile-time: ELASTIC_STRIDE (8, 16), ELASTIC_BLOCK (64, 128: keys of a block).
#pragma once
#include "elastic/schedule.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kStride = ELASTIC_STRIDE, kBlock = ELASTIC_BLOCK;
constexpr int kLogStride = kStride == 8 ? 3 : 4;
constexpr int kRows = 128, kCells = 256;         // rows of a tile, cells of a key tile
constexpr int kBlockCells = kBlock / kStride;    // cells of a key block
constexpr int kTileBlocks = kCells / kBlockCells;
constexpr int kQueryRows = kTileM / kStride;     // rows of a query block
constexpr int kSteps = kStride * kD / 64;        // steps of 64 along the contraction over phases and head dim
static_assert(kStride == 1 << kLogStride && kBlock % kStride == 0, "stride 8 or 16");

struct SelectParams {
  // map_q and map_k hold the phases from tail_q, tail_k on, map_v and map_o the phases before of q and k: these have
  // one row more. `bits` is written; `lse` is the scratch [CTAs, 128, columns].
  Params f;
  double threshold;
  float* mass;          // null, or [N, H, bits_rows, columns]: every block's estimated mass, for the tests
  int tail_q, tail_k;   // tokens of the tensors past the last whole cell
  int columns;          // key blocks of a scratch row, whole key tiles
  int shared_units;     // key blocks whose masses a warp can keep in shared memory
  int pad[8];
};
static_assert(sizeof(SelectParams) == 832, "elastic/kernels/params.py packs 832 bytes");

struct RowTiles {  // only block-sparse heads have tiles
  static constexpr bool kLastFirst = true;
  ELASTIC_FN static int class_of(int mode) { return mode == kBlockSparse ? 0 : 3; }
  ELASTIC_FN static int count(const Sample& s) { return ceil_div(s.len_q, kRows * kStride); }
  ELASTIC_FN static int heads_per_kv(const Params& p) { return p.heads / p.kv_heads; }
  // All heads side by side, so that tiles of one length run in step, unless the keys of one head alone exceed L2: then
  // one KV head after the other. Each is what was faster at its lengths.
  ELASTIC_FN static i64 row_bytes(const Sample& s, int head_dim, int) {
    const i64 bytes = i64(s.len_k) * head_dim * 2;
    return bytes > (48 << 20) ? bytes : 0;
  }
};

struct Extent {  // of one tile in its sample
  int first_row, rows;  // rows of the sample from the tile's first on may be fewer than 128
  int cells, shift;     // row i sees cells j <= i + shift, j < cells
  int past;             // position of the sample's first query

  ELASTIC_FN Extent(const Sample& s, int block) {
    first_row = block * kRows;
    rows = min_i(kRows, ceil_div(s.len_q, kStride) - first_row);
    cells = ceil_div(s.len_k, kStride);
    past = s.len_k - s.len_q;
    shift = (past + kStride - 1) >> kLogStride;
  }
  ELASTIC_FN int key_tiles() const {
    return ceil_div(max_i(0, min_i(cells, first_row + rows + shift)), kCells);
  }
};

// Row of the tile whose tokens end inside it, and how many it has; a sample of whole rows has none (row -1).
struct Tail {
  int row, tokens;
  ELASTIC_FN Tail(int length, int first_row) {
    tokens = length & (kStride - 1);
    row = tokens ? (length >> kLogStride) - first_row : -1;
  }
  ELASTIC_FN bool misses(int phase, int rows) const { return row >= 0 && row < rows && phase >= tokens; }
};

}  // namespace elastic
