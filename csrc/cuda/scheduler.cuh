// Which tile a block computes: groups of GROUP tile rows, walked column by column, so that blocks
// that run at the same time share rows of both operands in L2.
#pragma once
#include "types.cuh"

struct Tile {
  int m, n;
};

HOST_DEVICE Tile tile_at(int index, int tiles_m, int tiles_n) {
  constexpr int GROUP = 16;
  const int group = index / (GROUP * tiles_n);
  const int first = group * GROUP;
  const int height = tiles_m - first < GROUP ? tiles_m - first : GROUP;
  const int within = index - group * GROUP * tiles_n;
  return {first + within % height, within / height};
}
