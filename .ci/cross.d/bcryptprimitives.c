/* The random numbers of bcryptprimitives.dll, which Rust's standard library asks for and older Wine does not have. */
#include <windows.h>

BOOLEAN WINAPI SystemFunction036(PVOID to, ULONG length);

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE to, SIZE_T length)
{
    while (length > 0) {
        ULONG part = length > 0x10000000 ? 0x10000000 : (ULONG)length;
        if (!SystemFunction036(to, part))
            return FALSE;
        to += part;
        length -= part;
    }
    return TRUE;
}
