/** Open, create, read, convert, check and inspect qcow2 disk images, in-process. */
import { native } from './native.js'

/** The version of this package. */
export const version = '0.1.0'

void native
