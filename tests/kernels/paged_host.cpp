// Where the kernels look for tokens in pages, compiled for the host so that the tests can call it.
#include "elastic/paged_list.cuh"

using namespace elastic;

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
