// The sharing of decode attention, compiled for the host so that the tests can call it.
#include "elastic/decode_list.cuh"

using namespace elastic;

// Items of CTA `cta`, seven numbers each: head, begin, end, whole, slot, and which parts make up the head: first CTA and
// number of parts; then, for all parts, their slots. Returns the number of items.
extern "C" int items(const int* sink, const int* begin, const int* end, int heads, int ctas, int cta, int* counts,
                     int* offset, int* out, int* slots) {
  DecodeParams p{};
  p.sink = sink, p.begin = begin, p.end = end;
  offset[0] = 0;
  for (int h = 0; h < heads; ++h) {
    counts[h] = span_of(p, h).count;
    offset[h + 1] = offset[h] + units_of(counts[h]);
  }
  const Share share = share_of(offset[heads], ctas, cta);
  if (share.first >= share.last) return 0;
  int head = head_at(offset, heads, share.first), n = 0;
  const int first = head;
  for (; offset[head] < share.last; ++head, ++n) {
    const Item item = item_of(share, offset, head, counts[head]);
    const Parts parts = parts_of(share, offset, head);
    const int row[] = {item.head, item.begin, item.end, item.whole, slot_of(cta, head != first), parts.first, parts.count};
    for (int i = 0; i < 7; ++i) out[7 * n + i] = row[i];
    slots[n] = parts.slot(cta - parts.first);
  }
  return n;
}

// Place in the head's row of the i-th visible token.
extern "C" int token(int sink, int begin, int end, int i) {
  DecodeParams p{};
  p.sink = &sink, p.begin = &begin, p.end = &end;
  const Span span = span_of(p, 0);
  return i < span.sink ? i : i + span.skip;
}
