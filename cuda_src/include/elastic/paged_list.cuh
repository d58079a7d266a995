// What decode attention over pages reads, and the tokens that each of its heads sees: by mode and length, read here.
#pragma once
#include "elastic/decode_list.cuh"
#include "elastic/pages.cuh"

namespace elastic {

struct PagedDecodeParams : DecodeParams {  // base, sink, begin, end and token_stride are not used, sinks are null
  Pages pages;
  const int *length, *mode;                   // [B], tokens with the newest; [B, K]
  u32 page_stride, place_stride, head_stride;  // of keys and of values, in 16 bytes
  int capacity;                               // tokens of a table's row
  int streaming_sink, window, by_block, block;
};
static_assert(sizeof(PagedDecodeParams) == 192, "elastic/kernels/paged_decode.py packs 192 bytes");

ELASTIC_FN bool is_unknown(int mode) { return mode != kFull && mode != kStreaming; }

// A head of an unknown mode sees nothing, and `answer_of_none` makes that a NaN.
ELASTIC_FN Span span_of(const PagedDecodeParams& p, int head) {
  const int mode = p.mode[head];
  const int end = is_unknown(mode) ? 0 : min_i(p.length[head / p.kv_heads], p.capacity);
  const Rule rule = rule_of(mode, p.streaming_sink, p.window, p.by_block, p.block);
  return clipped(rule.sink, lower_bound(end - 1, rule), end);
}

// Token of the i-th visible one.
ELASTIC_FN int token_of(const Span& span, int i) { return i < span.sink ? i : i + span.skip; }

// Where the row of a token begins in the pool, in 16 bytes, but for its KV head.
ELASTIC_FN u32 offset_of(const PagedDecodeParams& p, int page, int token) {
  return u32(page) * p.page_stride + u32(p.pages.place(token)) * p.place_stride;
}

}  // namespace elastic
