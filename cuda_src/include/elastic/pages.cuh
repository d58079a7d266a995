// Keys and values in pages: a pool of pages that all requests share, and for every request a row of page numbers.
// Token t of a request is place t mod T of the page that entry t / T of its row names; T is a power of two.
// Compile-time: ELASTIC_PAGED (0: no pages; else not 0, on 9.0 the tokens of a TMA box, which lies in one page).
#pragma once
#include "elastic/params.cuh"

#ifndef ELASTIC_PAGED
#define ELASTIC_PAGED 0
#endif

namespace elastic {

struct Pages {
  const int* table;  // [B, ...], read up to a request's length
  int row, shift;    // entries from one request's row to the next; T = 1 << shift

  ELASTIC_FN const int* row_of(int sample) const { return table + i64(sample) * row; }
  ELASTIC_FN int entry(int token) const { return token >> shift; }
  ELASTIC_FN int place(int token) const { return token & ((1 << shift) - 1); }
};

// First token of box `box` of a block of two half blocks, whose numbers are the halves of `ids`, each in `of_half` boxes.
ELASTIC_FN int box_token(u32 ids, int box, int of_half) {
  return int((ids >> (box / of_half * 16)) & 0xffff) * kHalf + box % of_half * (kHalf / of_half);
}

// The forward pass over pages. Samples are requests; k and v are the pools [N, T, K, D]: their strides of a row are
// those of a page, those of a token of a place. begin_k is null, end_k [B] are the lengths, seq_k the tokens of a row.
struct PagedParams : Params {
  Pages pages;
  int pad[12];
};
static_assert(sizeof(PagedParams) == 832, "elastic/kernels/params.py packs 832 bytes");

#if ELASTIC_PAGED
using ForwardParams = PagedParams;
#else
using ForwardParams = Params;
#endif

}  // namespace elastic
