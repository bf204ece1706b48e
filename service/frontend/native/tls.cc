#include "tls.h"

#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace onclock {
namespace {

// The longest plain text of a record (RFC 8446, 5.1).
constexpr size_t kRecord = 16384;
// What is enciphered ahead of the socket: a slow reader's answers wait as plain text.
constexpr size_t kAhead = 64 << 10;
// An output that once held a burst is given back.
constexpr size_t kKeep = 128 << 10;

std::string why() {
  const unsigned long code = ERR_peek_last_error();
  ERR_clear_error();
  if (!code) return "unknown reason";
  const char *reason = ERR_reason_error_string(code);
  return reason ? reason : "error " + std::to_string(code);
}

template <typename Type, void (*Free)(Type *)>
struct Freed {
  void operator()(Type *pointer) const { Free(pointer); }
};
using Certificate = std::unique_ptr<X509, Freed<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>>;
struct FreeBio {
  void operator()(BIO *bio) const { BIO_free(bio); }
};
using Text = std::unique_ptr<BIO, FreeBio>;

Text text_of(const std::string &pem) { return Text(BIO_new_mem_buf(pem.data(), int(pem.size()))); }

// A key that needs a passphrase is refused: OpenSSL would ask the terminal for it.
int no_passphrase(char *, int, int, void *) { return -1; }

std::vector<Certificate> certificates_in(const std::string &pem, const char *what) {
  std::vector<Certificate> found;
  const Text text = text_of(pem);
  while (X509 *next = PEM_read_bio_X509(text.get(), nullptr, no_passphrase, nullptr)) found.emplace_back(next);
  const unsigned long code = ERR_peek_last_error();
  const bool at_end = ERR_GET_LIB(code) == ERR_LIB_PEM && ERR_GET_REASON(code) == PEM_R_NO_START_LINE;
  if (found.empty() || !at_end)
    throw std::invalid_argument(std::string(what) + ": expected certificates in PEM: " + why());
  ERR_clear_error();
  return found;
}

// Of what a client offers, HTTP/2 is all that there is.
int choose_h2(SSL *, const unsigned char **out, unsigned char *size, const unsigned char *in, unsigned int length, void *) {
  for (unsigned int at = 0; at + in[at] < length; at += 1 + in[at]) {
    if (in[at] == 2 && in[at + 1] == 'h' && in[at + 2] == '2') {
      *out = in + at + 1;
      *size = 2;
      return SSL_TLSEXT_ERR_OK;
    }
  }
  return SSL_TLSEXT_ERR_ALERT_FATAL;
}

}  // namespace

TlsContext make_tls_context(const std::string &chain, const std::string &key, const std::string &client_authorities) {
  ERR_clear_error();
  TlsContext context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  if (!context) throw std::invalid_argument("TLS: " + why());
  SSL_CTX *const raw = context.get();
  SSL_CTX_set_min_proto_version(raw, TLS1_2_VERSION);
  // HTTP/2 allows only these of TLS 1.2 (RFC 9113, 9.2.2).
  SSL_CTX_set_cipher_list(raw, "ECDHE+AESGCM:ECDHE+CHACHA20");
  // Both lengths are safe for longer than anybody's traffic matters, and the shorter costs a fifth less.
  SSL_CTX_set_ciphersuites(raw, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256");
  SSL_CTX_set_options(raw, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                               SSL_OP_PRIORITIZE_CHACHA | SSL_OP_NO_TICKET);
  // gRPC's clients keep connections, not sessions; without resumption, a certificate is looked at on every connection.
  SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_num_tickets(raw, 0);
  SSL_CTX_set_mode(raw, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_alpn_select_cb(raw, choose_h2, nullptr);
  const auto certificates = certificates_in(chain, "certificate");
  if (SSL_CTX_use_certificate(raw, certificates[0].get()) != 1) throw std::invalid_argument("certificate: " + why());
  for (size_t i = 1; i < certificates.size(); i++)
    if (SSL_CTX_add1_chain_cert(raw, certificates[i].get()) != 1) throw std::invalid_argument("certificate: " + why());
  const Text text = text_of(key);
  const Key secret(PEM_read_bio_PrivateKey(text.get(), nullptr, no_passphrase, nullptr));
  if (!secret) throw std::invalid_argument("key: expected a private key in PEM, without a passphrase: " + why());
  if (SSL_CTX_use_PrivateKey(raw, secret.get()) != 1 || SSL_CTX_check_private_key(raw) != 1)
    throw std::invalid_argument("key: it does not belong to the certificate: " + why());
  if (!client_authorities.empty()) {
    for (const Certificate &authority : certificates_in(client_authorities, "client authorities")) {
      X509_STORE_add_cert(SSL_CTX_get_cert_store(raw), authority.get());
      SSL_CTX_add_client_CA(raw, authority.get());
    }
    SSL_CTX_set_verify(raw, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  }
  ERR_clear_error();
  return context;
}

int64_t end_of(const TlsContext &context) {
  tm end{};
  ASN1_TIME_to_tm(X509_get0_notAfter(SSL_CTX_get0_certificate(context.get())), &end);
  return int64_t(timegm(&end));
}

Tls::Tls(const TlsContext &context) : context_(context), ssl_(SSL_new(context.get())) {
  if (!ssl_) throw std::bad_alloc();
  BIO *const bio = BIO_new(method());
  if (!bio) {
    SSL_free(ssl_);
    throw std::bad_alloc();
  }
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_, bio, bio);
  SSL_set_accept_state(ssl_);
}

Tls::~Tls() { SSL_free(ssl_); }

const BIO_METHOD *Tls::method() {
  static const BIO_METHOD *const made = [] {
    BIO_METHOD *const fresh = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "onclock");
    BIO_meth_set_read(fresh, &Tls::take);
    BIO_meth_set_write(fresh, &Tls::give);
    BIO_meth_set_ctrl(fresh, &Tls::control);
    return fresh;
  }();
  return made;
}

int Tls::take(BIO *bio, char *to, int room) {
  Tls &self = *static_cast<Tls *>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  if (!self.in_size_) {
    BIO_set_retry_read(bio);
    return -1;
  }
  const size_t size = std::min(size_t(room), self.in_size_);
  memcpy(to, self.in_, size);
  self.in_ += size;
  self.in_size_ -= size;
  return int(size);
}

int Tls::give(BIO *bio, const char *data, int size) {
  BIO_clear_retry_flags(bio);
  static_cast<Tls *>(BIO_get_data(bio))->cipher_.append(data, size_t(size));
  return size;
}

long Tls::control(BIO *, int command, long, void *) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

void Tls::feed(const char *data, size_t size) {
  in_ = data;
  in_size_ = size;
}

ssize_t Tls::read(char *to, size_t room) {
  if (broken_) return -1;
  ERR_clear_error();
  const int size = SSL_read(ssl_, to, int(std::min(room, size_t(INT32_MAX))));
  if (size > 0) return size;
  if (SSL_get_error(ssl_, size) == SSL_ERROR_WANT_READ) return 0;
  broken_ = true;
  ERR_clear_error();
  return -1;
}

bool Tls::ready() const { return SSL_is_init_finished(ssl_); }

bool Tls::write(Output &plain, int fd) {
  // Where pieces of a record are put together; one for each thread that writes, not for each connection.
  static thread_local char record[kRecord];
  for (;;) {
    if (!send(fd)) return false;
    if (pending() || !plain.pending() || !ready()) return true;
    ERR_clear_error();
    while (plain.pending() && cipher_.size() < kAhead) {
      const auto [data, size] = plain.next(record, kRecord);
      if (broken_ || SSL_write(ssl_, data, int(size)) != int(size)) {
        // The other side can take nothing at all: the output has no end.
        ERR_clear_error();
        return false;
      }
      plain.consume(size);
    }
  }
}

bool Tls::send(int fd) {
  while (pending()) {
    const ssize_t taken = ::send(fd, cipher_.data() + sent_, pending(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (taken < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK;
    }
    sent_ += size_t(taken);
  }
  cipher_.clear();
  if (cipher_.capacity() > kKeep) cipher_.shrink_to_fit();
  sent_ = 0;
  return true;
}

void Tls::farewell(int fd) {
  if (!broken_ && ready()) SSL_shutdown(ssl_);
  ERR_clear_error();
  send(fd);
}

}  // namespace onclock
