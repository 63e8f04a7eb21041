// Reading a problem from standard input.
#pragma once

#include "simt.h"

inline std::vector<uint8_t> read(size_t bytes) {
  std::vector<uint8_t> data(bytes);
  if (std::fread(data.data(), 1, bytes, stdin) != bytes) simt::fail("the problem is too short");
  return data;
}

inline int number() {
  int32_t value;
  std::memcpy(&value, read(4).data(), 4);
  return value;
}
