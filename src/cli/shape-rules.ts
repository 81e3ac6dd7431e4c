/** What the options of a new qcow2 image demand of each other, in the words that users of qemu-img know. */

import type { Qcow2Shape, TargetFormat } from '../index.js'
import { CommandFailure } from './failure.js'

const NEEDS_V3 = 'compatibility level 1.1 and above (use version=v3 or greater)'

const isV2 = ({ version }: Qcow2Shape): boolean => version === 2
const preallocates = ({ preallocation = 'off' }: Qcow2Shape): boolean => preallocation !== 'off'

function badClusterSize({ clusterSize = 65536 }: Qcow2Shape): boolean {
  return clusterSize < 512 || clusterSize > 2 << 20 || !Number.isInteger(Math.log2(clusterSize))
}

/** Whether a shape breaks a rule, and what is said then. In the order in which QEMU looks at them: the first one counts. */
const RULES: readonly (readonly [broken: (shape: Qcow2Shape) => boolean | undefined, message: string])[] = [
  [
    ({ keepDataFile, dataFile }) => keepDataFile && dataFile === undefined,
    "Must not use 'keep_data_file=on' without 'data_file'",
  ],
  [
    ({ keepDataFile, preallocation }) => keepDataFile && (preallocation === 'falloc' || preallocation === 'full'),
    "Preallocating more than only metadata would overwrite the external data file's content and is therefore incompatible with " +
      "'keep_data_file=on'",
  ],
  [
    shape => shape.keepDataFile && !shape.dataFileRaw && !preallocates(shape),
    "'keep_data_file=on' requires 'preallocation=metadata' or 'data_file_raw=on', or the file contents will not be visible",
  ],
  [shape => isV2(shape) && shape.extendedL2, `Extended L2 entries are only supported with ${NEEDS_V3}`],
  [badClusterSize, 'Cluster size must be a power of two between 512 and 2048k'],
  [
    ({ extendedL2, clusterSize = 65536 }) => extendedL2 && clusterSize < 16384,
    'Extended L2 entries are only supported with cluster sizes of at least 16384 bytes',
  ],
  [
    shape => shape.backingFile !== undefined && preallocates(shape) && !shape.extendedL2,
    'Backing file and preallocation can only be used at the same time if extended_l2 is on',
  ],
  [
    ({ backingFormat, backingFile }) => backingFormat !== undefined && backingFile === undefined,
    'Backing format cannot be used without backing file',
  ],
  [shape => isV2(shape) && shape.lazyRefcounts, `Lazy refcounts only supported with ${NEEDS_V3}`],
  [
    shape => isV2(shape) && (shape.refcountBits ?? 16) !== 16,
    'Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)',
  ],
  [({ dataFileRaw, dataFile }) => dataFileRaw && dataFile === undefined, 'data-file-raw requires data-file'],
  [
    ({ dataFileRaw, backingFile }) => dataFileRaw && backingFile !== undefined,
    'Backing file and data-file-raw cannot be used at the same time',
  ],
  [shape => isV2(shape) && shape.dataFile !== undefined, `External data files are only supported with ${NEEDS_V3}`],
  [
    shape => isV2(shape) && shape.compressionType === 'zstd',
    `Non-zlib compression type is only supported with ${NEEDS_V3}`,
  ],
]

/** The L1 table may have 32 MiB, 8 bytes for each L2 table, which maps a cluster for every 8 (with subclusters, 16) of its own. */
function largestDisk({ clusterSize = 65536, extendedL2 = false }: Qcow2Shape): bigint {
  const cluster = BigInt(clusterSize)
  return ((32n << 20n) / 8n) * (cluster / (extendedL2 ? 16n : 8n)) * cluster
}

/** Largest disk that an image of a format can have; absent where its file is the bound. */
const LARGEST: Readonly<Partial<Record<TargetFormat, (shape: Qcow2Shape) => bigint>>> = { qcow2: largestDisk }

/** Refuses a disk that the clusters are too small for. */
export function checkDiskSize(format: TargetFormat, shape: Qcow2Shape, size: bigint): void {
  const largest = LARGEST[format]?.(shape)
  if (largest !== undefined && size > largest) {
    throw new CommandFailure(
      `The image size is too large for file format '${format}' (try using a larger cluster size)`,
    )
  }
}

/** Refuses a shape whose options contradict each other. */
export function checkShape(shape: Qcow2Shape): void {
  for (const [broken, message] of RULES) {
    if (broken(shape)) throw new CommandFailure(message)
  }
}
