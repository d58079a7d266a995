// Shared memory of a CTA of the forward pass and the protocol between its producer lane and its two consumer warpgroups.
//
// full_q[i]  1 arrival + bytes   header i and the Q tile are in place (a tile without blocks brings no bytes)
// empty_q[i] 8 arrivals          every consumer warp is done with header i, with Q, and with O staged in its place
// full_k/v   1 arrival + bytes   stage and its ring entry are in place; K runs one block ahead of V
// empty_k/v  8 arrivals          every consumer warp is done with the stage (K: also with the ring entry)
// The producer starts on phase 1 (everything is empty), the consumers on phase 0.
// Over pages (ELASTIC_PAGED) the producer is a warp, and kLoaders further warps load V; they read headers and ring
// entries as the consumers do, so empty_q and empty_k count an arrival of each.
#pragma once
#include "elastic/pages.cuh"
#include "elastic/ptx_sm90.cuh"
#include "elastic/schedule.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM;
constexpr int kConsumerWarps = 8;
constexpr int kLoaders = ELASTIC_PAGED ? 2 : 0;
constexpr int kReaders = kConsumerWarps + kLoaders;  // of headers and ring entries
constexpr int kStages = kD == 64 ? 4 : 2;
constexpr int kBlockN = 2 * kHalf;
constexpr int kTileBytesQ = kTileM * kD * 2, kTileBytesKV = kBlockN * kD * 2;
constexpr int kNone = 0xffff;  // id of a missing half block: beyond every sequence, so TMA fills it with zeros

constexpr int kWork = 0, kEmpty = 1, kPoison = 2, kDone = 3;

struct Header {  // of one tile
  int state, row, head, q_row;     // q_row: first query row in the batch row
  int rows, position, len_k, sample;  // query rows of the sample from the tile's first on; its position
  Rule rule;
};

// ids: low 16 bits the first half block, high 16 the second. flags: what the consumers must do with them.
constexpr u32 kLast = 1, kMask0 = 2, kMask1 = 4, kTail = 8;
struct Entry {
  u32 ids, flags;
};

struct Control {
  u64 full_q[2], empty_q[2];
  u64 full_k[kStages], empty_k[kStages], full_v[kStages], empty_v[kStages];
  Entry ring[kStages];
  Header header[2];
  ScheduleSize size;
};

struct SharedLayout {  // offsets from a base that is a multiple of 1024
  static constexpr int q = 0;
  static constexpr int k = q + 2 * kTileBytesQ;
  static constexpr int v = k + kStages * kTileBytesKV;
  static constexpr int control = v + kStages * kTileBytesKV;
  static constexpr int segments = control + 1024;
};
static_assert(sizeof(Control) <= 1024, "the schedule starts 1024 bytes after the barriers");

}  // namespace elastic
