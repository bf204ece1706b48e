// Who may call the served method, by the key that a call carries.
//
// Promise: a key is known by its SHA-256 alone, so nothing here could be used to call. What a connection sends again and
// again is looked up once.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace onclock {

using Digest = std::array<unsigned char, 32>;

// The digest of a key in the value of an `authorization` header ("Bearer KEY"). False: it is something else.
bool digest_of(const char *text, size_t size, Digest &digest);

struct Caller {
  int64_t number = 0;  // what Python knows them by
  bool may_infer = false;
};

// Replaced whole. Without one, everybody may do everything.
struct Access {
  std::map<Digest, Caller> callers;
  Caller anonymous;  // whoever shows no key
};

// What a connection was last told: the header's value, kept so that its address is not used again, and who that is.
struct Known {
  Known() = default;
  Known(const Known &) = delete;
  ~Known() {
    if (credentials) nghttp2_rcbuf_decref(credentials);
  }
  nghttp2_rcbuf *credentials = nullptr;
  uint64_t generation = 0;
  bool found = false;
  Caller caller;
};

}  // namespace onclock
