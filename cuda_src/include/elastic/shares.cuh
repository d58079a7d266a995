// How a launch over cached keys shares its work: the tokens of all heads, cut into units, form one list, and every CTA
// takes an equal, contiguous share of it. The last CTA that finishes a part of a head puts the head together. A head
// here is a KV head of a sample.
#pragma once
#include "elastic/block_range.cuh"

namespace elastic {

constexpr int kUnit = 64;       // tokens, the grain of the shares
constexpr int kLeastUnits = 2;  // a share below this is not worth a CTA

// A head without tokens has one unit too: somebody must write its zeros.
ELASTIC_FN int units_of(int tokens) { return max_i(1, (tokens + kUnit - 1) / kUnit); }

struct Share {  // of one CTA: units [first, last) of the list; the first `longer` workers have one more than `each`
  int workers, each, longer, first, last;

  ELASTIC_FN int begin_of(int worker) const { return worker * each + min_i(worker, longer); }

  ELASTIC_FN int worker_of(int unit) const {
    const int past = unit - longer * (each + 1);
    return past < 0 ? unit / (each + 1) : longer + past / each;
  }
};

ELASTIC_FN Share share_of(int units, int ctas, int cta) {
  Share share;
  share.workers = min_i(ctas, max_i(1, units / kLeastUnits));
  share.each = units / share.workers, share.longer = units % share.workers;
  share.first = share.begin_of(min_i(cta, share.workers)), share.last = share.begin_of(min_i(cta + 1, share.workers));
  return share;
}

// In what follows offset[h] is the number of units before head h, with one more entry for the end.
struct Item {  // a CTA's part of one head: visible tokens [begin, end)
  int head, begin, end;
  bool whole;
};

ELASTIC_FN Item item_of(const Share& share, const int* offset, int head, int count) {
  const int first = max_i(share.first - offset[head], 0), last = min_i(share.last, offset[head + 1]) - offset[head];
  const bool whole = share.first <= offset[head] && offset[head + 1] <= share.last;
  return {head, first * kUnit, min_i(last * kUnit, count), whole};
}

ELASTIC_FN int head_at(const int* offset, int heads, int unit) {  // the last head that begins at or before the unit
  int low = 0, high = heads - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (offset[middle] <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A CTA stores parts of at most two heads: of the first that it meets in slot 0, of a later one in slot 1.
ELASTIC_FN int slot_of(int cta, bool later) { return 2 * cta + later; }

struct Parts {  // of a head that several CTAs share: CTAs first .. first + count - 1
  int first, count;
  bool later;  // the first of them met another head before

  ELASTIC_FN int slot(int part) const { return slot_of(first + part, part == 0 && later); }
};

ELASTIC_FN Parts parts_of(const Share& share, const int* offset, int head) {
  const int first = share.worker_of(offset[head]), last = share.worker_of(offset[head + 1] - 1);
  return {first, last - first + 1, share.begin_of(first) < offset[head]};
}

}  // namespace elastic
