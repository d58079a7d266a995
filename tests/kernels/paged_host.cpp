// Where the kernels look for tokens in pages, compiled for the host so that the tests can call it.
#include "elastic/paged_list.cuh"
#include "elastic/schedule.cuh"

using namespace elastic;

// Of a packed launch of decoding: addresses of the keys and values that KV head `head` of all requests reads, and of its
// first query and output; returns the number of keys.
extern "C" int decode_addresses(const PagedDecodeParams* p, int head, u64* keys, u64* values, u64* rows) {
  const int b = head / p->kv_heads, k = head % p->kv_heads, group = p->heads / p->kv_heads;
  const Span span = span_of(*p, head);
  for (int i = 0; i < span.count; ++i) {
    const int token = token_of(span, i), page = p->pages.row_of(b)[p->pages.entry(token)];
    const u64 key = u64(p->keys) + u64(u32(k) * p->head_stride + offset_of(*p, page, token)) * 16;
    keys[i] = key, values[i] = key + (p->values - p->keys);
  }
  rows[0] = u64(p->q) + 2 * (b * p->q_sample + k * group * p->q_head), rows[1] = 2 * p->q_head;
  rows[2] = u64(p->out) + 2 * u64(head) * group * rows[3];  // [B, K, G, D]; rows[3] holds D
  return span.count;
}

// Of a packed launch of the forward pass: row, begin_q, begin_k, len_q and len_k of a request, and the mode of a head.
extern "C" void sample_of(const PagedParams* p, int n, int head, int* out) {
  const Sample s = read_sample(*p, n);
  out[0] = s.row, out[1] = s.begin_q, out[2] = s.begin_k, out[3] = s.len_q, out[4] = s.len_k;
  out[5] = p->mode[n * p->kv_heads + head];
}

// Address of a key as the kernel that reads by address finds it.
extern "C" u64 key_address(const PagedParams* p, int n, int head, int token) {
  const i64 page = p->pages.row_of(n)[p->pages.entry(token)];
  return u64(p->k) + 2 * (head * p->stride_k.head + page * p->stride_k.row + p->pages.place(token) * p->stride_k.token);
}

// Page (or -1) and place of every box of a block, as `boxes` below, of a packed launch.
extern "C" int boxes_of(const PagedParams* p, int n, u32 ids, int of_half, int* page, int* place) {
  const Sample s = read_sample(*p, n);
  for (int i = 0; i < 2 * of_half; ++i) {
    const int token = box_token(ids, i, of_half);
    page[i] = token < s.len_k ? p->pages.row_of(n)[p->pages.entry(token)] : -1;
    place[i] = p->pages.place(token);
  }
  return 2 * of_half;
}

// Offsets, in 16 bytes from a pool's start, of the visible tokens of KV head `head` (of all requests) in decoding, in
// the order in which the kernel reads them; returns their number.
extern "C" int decode_offsets(const int* table, int row, int shift, const int* length, const int* mode, int kv_heads,
                              int head, u32 page_stride, u32 place_stride, u32 head_stride, int capacity, int sink,
                              int window, int by_block, int block, u32* out) {
  PagedDecodeParams p{};
  p.pages = Pages{table, row, shift};
  p.length = length, p.mode = mode, p.kv_heads = kv_heads;
  p.page_stride = page_stride, p.place_stride = place_stride, p.head_stride = head_stride;
  p.capacity = capacity, p.streaming_sink = sink, p.window = window, p.by_block = by_block, p.block = block;
  const Span span = span_of(p, head);
  for (int i = 0; i < span.count; ++i) {
    const int token = token_of(span, i);
    const int page = p.pages.row_of(head / kv_heads)[p.pages.entry(token)];
    out[i] = u32(head % kv_heads) * head_stride + offset_of(p, page, token);
  }
  return span.count;
}

// Page (or -1) and place of every box of a block, as the producer of the forward pass asks for them; returns their number.
extern "C" int boxes(const int* table, int row, int shift, int sample, u32 ids, int of_half, int len_k, int* page,
                     int* place) {
  const Pages pages{table, row, shift};
  for (int i = 0; i < 2 * of_half; ++i) {
    const int token = box_token(ids, i, of_half);
    page[i] = token < len_k ? pages.row_of(sample)[pages.entry(token)] : -1;
    place[i] = pages.place(token);
  }
  return 2 * of_half;
}
