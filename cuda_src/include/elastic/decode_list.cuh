// What decode attention reads, and the tokens that each of its heads sees: their list is shared out by shares.cuh.
#pragma once
#include "elastic/shares.cuh"

namespace elastic {

struct DecodeParams {
  const char *q, *keys, *values;
  char* out;
  const i64* base;                     // [B, K], row of token 0
  const int *sink, *begin, *end;       // [B, K], tokens
  float* partial;                      // [2 * CTAs, G, D], then [2 * CTAs, G, 2]: maximum and sum
  int* arrived;                        // [B, K], zero before and after every launch
  const float* sinks;                  // [H], a logit that joins a query head's softmax, or null
  i64 q_sample, q_head, token_stride;  // elements, elements, rows
  int samples, heads, kv_heads;
  float scale_log2;
};
static_assert(sizeof(DecodeParams) == 128, "elastic/kernels/attention_decode.py packs 128 bytes");

struct Span {  // the visible tokens of a head, numbered 0..count: the sink, then the rest, `skip` tokens further on
  int sink, skip, count;
};

// Of a sink, a first token after it and an end that may be any numbers.
ELASTIC_FN Span clipped(int of_sink, int of_begin, int of_end) {
  const int end = max_i(of_end, 0), sink = min_i(max_i(of_sink, 0), end);
  const int begin = min_i(max_i(of_begin, sink), end);
  return {sink, begin - sink, sink + end - begin};
}

ELASTIC_FN Span span_of(const DecodeParams& p, int head) { return clipped(p.sink[head], p.begin[head], p.end[head]); }

}  // namespace elastic
