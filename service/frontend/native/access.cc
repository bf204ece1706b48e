#include "access.h"

#include <openssl/evp.h>
#include <strings.h>

namespace onclock {

bool digest_of(const char *text, size_t size, Digest &digest) {
  static const char kScheme[] = "Bearer ";
  constexpr size_t kLength = sizeof kScheme - 1;
  // The scheme's case does not matter (RFC 9110, 11.1).
  if (size <= kLength || strncasecmp(text, kScheme, kLength)) return false;
  while (size > kLength && text[size - 1] == ' ') size--;
  const char *key = text + kLength;
  const char *const end = text + size;
  while (key < end && *key == ' ') key++;
  unsigned int length = 0;
  return key < end && EVP_Digest(key, size_t(end - key), digest.data(), &length, EVP_sha256(), nullptr) == 1 &&
         length == digest.size();
}

}  // namespace onclock
