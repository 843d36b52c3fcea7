// C++ libraries of newer systems count references by way of a flag of glibc 2.32, and torch itself
// needs 2.28. With a flag of our own, which says "perhaps several threads", so does the extension.
#ifdef __linux__
extern "C" {
__attribute__((visibility("hidden"))) extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif
