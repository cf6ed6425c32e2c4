//! Keys for tests only: made once with the openssl command line, used nowhere else.

pub(super) const RSA_PRIVATE: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQCWK0lk0sssV7DW\n\
zvbFFTZYTgFVln/si3Txea3Uxp1YmvKuP7z9xW2YIKjSaV4nGbpgAtpqcnZN2fSz\n\
kbsHRsHqYbm3fBFcI47ur+6GodUUT0/PKZ3OyeuZJCcVEJ4sje2+PZIOiPdBVOtZ\n\
0AkpiXdUcuZaiLe+Kk1QKEr5gn5Wk1t2oDxHPzp8nyqxYtWcF7fzgRouLYIgeq6G\n\
WT3vWI7HyFA6D232UyzB1vTvHGLHh/0U8EBRm92o7ezPCy7V28/AH4eqWCU4z3Ag\n\
EPG6pAk1/H4UOT5xjKHj5CdiQF2ihsyHB4/p4aQFPs5SZI1nS3MX8tGLHHUNoy6R\n\
aHdzUq0FAgMBAAECggEABLnAfpAYM8esdjOlnHHMl8Gx243+OqtwM7aJSjT+cX63\n\
LKIVvuOmJv+LtUr6p97XC8Hs0/HQ3lk03av0MRt6KzeSw7iMOeeZjh8Fsc41n+tX\n\
ntrxQlDK3Yyy2SaAeVtb1BAcDXtXn1vxgXSuCrtVDYu4sYUnYrA+/7FNtX8OHdT+\n\
Pu6565NT73SYaLTOXX51t+Usdw4WFusw0XeUiU32GDmtKdiavJxgN9WtjduP2S1t\n\
wkiRo0eA9QXqkTvNzh7ECYdlL4Ed86yvwHUjPk8549qzYDfgxREVmqczfVyVUukf\n\
zQVOY+WEuqWrhqYuhJlSTqCoJjL4UNf9nnx+MBRX2QKBgQDFUTc8lA7kLDPoXDXk\n\
qgcgfPPWPqbSL5mI5rseV+3CIO9/NIe6QKYLitOJktI1qJj9rjzdFPyX3FShwlmH\n\
t/ndq3s+KOkok/cBTGoVQXjcf+a65fwY1V5DWEEWPSsdjeRt3kc8UuIbS1PkQ6D4\n\
QwGs1Ver2MOwaIyNvm1izR7izQKBgQDC1G/v91rsxkOw2H21x2RVp6JHg2PQRSEO\n\
mkL69/88Bec8USXjtX0QG8LUYGC632gVCrEjZADnG/1WTVBC+L8WxJrQb2psoQrT\n\
lxieyYJwMnVdIXvnBjZw/7w/aBeEeiRZ78ivciSQrllLUuEnjLBxG2EQOkRYzH+6\n\
StVPoH6jGQKBgGzGvh2+PYtaNu90zh0WAsHNQJsuhMbAiPKoyCUNMjxf7cgBjIWI\n\
GEGqsb1Y3FvKazUGdfUnGa0aQOm/+51PNgcW/uUgppDBKV1k4+J96oQcWnVUTire\n\
jY2wvIjnBbrQO0q6TCkcRBvp5gCjq7zRK749Cozo/dBlgn6tqR3bmJhNAoGAESl/\n\
dsb2RncsjU50vGeFChqLK/uB9l2wjMW/8rWX0SS/+ss3KDjbfGjFn8mhm7SESZ44\n\
fmKXxcPsbAbBdDTPOGU3Mfcui8Uf3AWqUIp1qAZ52itR68bbUtbkMT2tHKlZvGZn\n\
6jSGzgvdp8n0NXSqMjx0L2bCkIPrGHDxG2OK5DkCgYEAhUA4uzZKSELvVpzHm7L6\n\
8e0zw2fGJ51w3+z8A/I8xDntPr3v0B37ACDwHCAG0/jLskrD1DYWEyK8e0/vDl8L\n\
zCN4AOGibWrCv/zPHm8yFLjOTNvQPZmc7qbP82afGnpPLpBFb5DlWNKaKamSF1MR\n\
ub6gRlsUD3fOt9H9JlQ5oUc=\n\
-----END PRIVATE KEY-----\n";

pub(super) const RSA_PUBLIC: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAlitJZNLLLFew1s72xRU2\n\
WE4BVZZ/7It08Xmt1MadWJryrj+8/cVtmCCo0mleJxm6YALaanJ2Tdn0s5G7B0bB\n\
6mG5t3wRXCOO7q/uhqHVFE9PzymdzsnrmSQnFRCeLI3tvj2SDoj3QVTrWdAJKYl3\n\
VHLmWoi3vipNUChK+YJ+VpNbdqA8Rz86fJ8qsWLVnBe384EaLi2CIHquhlk971iO\n\
x8hQOg9t9lMswdb07xxix4f9FPBAUZvdqO3szwsu1dvPwB+HqlglOM9wIBDxuqQJ\n\
Nfx+FDk+cYyh4+QnYkBdoobMhweP6eGkBT7OUmSNZ0tzF/LRixx1DaMukWh3c1Kt\n\
BQIDAQAB\n\
-----END PUBLIC KEY-----\n";

pub(super) const RSA_PUBLIC_PKCS1: &str = "\
-----BEGIN RSA PUBLIC KEY-----\n\
MIIBCgKCAQEAlitJZNLLLFew1s72xRU2WE4BVZZ/7It08Xmt1MadWJryrj+8/cVt\n\
mCCo0mleJxm6YALaanJ2Tdn0s5G7B0bB6mG5t3wRXCOO7q/uhqHVFE9Pzymdzsnr\n\
mSQnFRCeLI3tvj2SDoj3QVTrWdAJKYl3VHLmWoi3vipNUChK+YJ+VpNbdqA8Rz86\n\
fJ8qsWLVnBe384EaLi2CIHquhlk971iOx8hQOg9t9lMswdb07xxix4f9FPBAUZvd\n\
qO3szwsu1dvPwB+HqlglOM9wIBDxuqQJNfx+FDk+cYyh4+QnYkBdoobMhweP6eGk\n\
BT7OUmSNZ0tzF/LRixx1DaMukWh3c1KtBQIDAQAB\n\
-----END RSA PUBLIC KEY-----\n";

pub(super) const RSA_1024_PUBLIC: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDFkiqtoyxLfJtkDdr6H2r+8jQK\n\
erRQ/JomlaxjMKxgCcx9h9OIEAxfSTZQ8yrMLPAfK8Gz9VCQYL/J2noRMk/LI4Lc\n\
h7r4GtplI7EjYuCIZvNPkjgWVOLagTeskmiS6rr6sPsoBL9Mts2TvQVH+CWVcL+l\n\
PPZTseRsFIZ4MgyDkwIDAQAB\n\
-----END PUBLIC KEY-----\n";

pub(super) const EC_PRIVATE: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg1P0oW0hQRPAhkai\n\
11DBTxoKnaf5+B/5P/H1/YgkKL2hRANCAATPkqvDlf8cknzHiln9WgBXsWJAk7xY\n\
4QP/Wvwl8a/1fSzmW8nxe3UM5XPy7YMop935zK2DLloqpsvI+gFJTbu8\n\
-----END PRIVATE KEY-----\n";

pub(super) const EC_PUBLIC: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEz5Krw5X/HJJ8x4pZ/VoAV7FiQJO8\n\
WOED/1r8JfGv9X0s5lvJ8Xt1DOVz8u2DKKfd+cytgy5aKqbLyPoBSU27vA==\n\
-----END PUBLIC KEY-----\n";

pub(super) const P384_PUBLIC: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAExjyE4vm9kE5puQsDxbDmQ0Ha+wwaCtSs\n\
msnsVOfhokRNfpMzsTbyiXZY6ucsc6WdfdBChwiyxsn2ajNJDJjf1LAA8fs2OVzU\n\
rWEYymRBSxqQ5jymFQByB3QagNIHX84L\n\
-----END PUBLIC KEY-----\n";

pub(super) const ED_PRIVATE: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MC4CAQAwBQYDK2VwBCIEIA0drNfPtzlEIr+JhiKx2OhWrw+XUDskof5hosBmst9d\n\
-----END PRIVATE KEY-----\n";

pub(super) const ED_PUBLIC: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MCowBQYDK2VwAyEAcqmrSdYjXtNi0sSmKrQeOoOwujmxwpQEs3d1/i11GxY=\n\
-----END PUBLIC KEY-----\n";
