/**
 * The formats of images, in one table: what each is known by, how it is opened, and what can be done with it. Names are QEMU's. A format
 * that is opened has a row in `crates/node/src/formats.rs`, too; one that is made has its `-o` options in `cli/create-options.ts`.
 */

import { ascii, bochsSize, cloopSize, dmgSize, qedSize, type SizeReader, startsWith, vpcSize } from './sizes.js'

/** Bytes that only files of one format have, at this offset (0 without it). */
export interface Magic {
  readonly bytes: Buffer
  readonly offset?: number
}

/** What files of a format are known by: one of these. */
export interface Marks {
  readonly magics?: readonly Magic[]
  /** What else its first bytes are. */
  readonly matches?: (head: Buffer) => boolean
  /** A structure at the end of the file that makes it one, too: its magic and its length. QEMU does not look for it. */
  readonly footer?: { readonly bytes: Buffer; readonly length: number }
}

/** What only some formats can. */
export type Ability =
  /** Guest bytes can be changed, and the disk's size. */
  | 'write'
  /** Clusters can be written compressed. */
  | 'compress'
  | 'snapshots'
  | 'bitmaps'
  | 'check'
  | 'compact'
  | 'amend'
  /** Key slots, where an image is encrypted with them. */
  | 'keys'
  /** It can go into its backing file, and another can come under it. */
  | 'commit'
  | 'rebase'

/** How an image of a format is opened, and what it can be: a source, a backing file, and more. */
export interface Traits {
  /** Opened without being named. False where a guest can write any bytes in front: then the caller has to say the format. */
  readonly probed: boolean
  /** The file is the disk: it has no metadata, and nobody needs to be kept from changing it. */
  readonly plain: boolean
  /** What else QEMU calls it where an image names the format of its backing file. */
  readonly aliases: readonly string[]
  /** Other words for it on the command line. */
  readonly words?: readonly string[]
  /** Another image can lie below. */
  readonly backingFile: boolean
  /** Multiple in bytes that QEMU takes requests on the disk in. */
  readonly requestAlignment: number
  /** QEMU's driver of it says nothing of its clusters, and nothing of whether it is dirty. */
  readonly silent?: true
  readonly can: readonly Ability[]
  /** How new ones are made; absent where they are not. */
  readonly create?: Creation
}

/** Options of the shape of a new image. */
export type ShapeOption =
  | 'version'
  | 'clusterSize'
  | 'extendedL2'
  | 'compressionType'
  | 'preallocation'
  | 'refcountBits'
  | 'lazyRefcounts'
  | 'backingFile'
  | 'backingFormat'
  | 'dataFile'
  | 'dataFileRaw'
  | 'keepDataFile'
  | 'encrypt'
  | FormatOption

/** Those of them that a format reads by itself: they reach its crate by these names. */
export type FormatOption =
  | 'preset'
  | 'subformat'
  | 'adapterType'
  | 'hardwareVersion'
  | 'toolsVersion'
  | 'compat6'
  | 'zeroedGrain'
  | 'blockSize'
  | 'logSize'
  | 'blockStateZero'
  | 'logicalSectorSize'
  | 'static'
  | 'forceSize'

/** What a new image of a format can be made with. */
export interface Creation {
  readonly shape: readonly ShapeOption[]
  readonly preallocation: readonly ('off' | 'metadata' | 'falloc' | 'full')[]
  /** What it is not made without. */
  readonly needs?: ShapeOption
  /** What `subformat` can be; the first one is made where nothing is said. */
  readonly subformats?: readonly string[]
  /** What `preset` can be: products that take images of a certain shape alone. */
  readonly presets?: readonly string[]
  /** New ones, or those of some subformats, are compressed as a whole, though nothing is compressed that exists. */
  readonly compressed?: boolean
  /** It can be written front to back: all of it, or its images of this subformat. */
  readonly streamed?: true | string
  /** The only format of a backing file. */
  readonly backingFormat?: 'vmdk' | 'vpc' | 'vdi' | 'vhdx'
  /** It stores no name of its backing file, and knows it by its UUID alone. */
  readonly namelessBacking?: true
  /** It stores when its backing file was last changed. */
  readonly datesBacking?: true
}

/** The formats that images are read in, by QEMU's names. `qcow` is version 1 of qcow2, `luks` is LUKS of both versions, `vpc` is VHD. */
export type Format = 'qcow2' | 'raw' | 'qcow' | 'luks' | 'vdi' | 'vpc' | 'parallels' | 'vhdx' | 'vmdk'

/** The formats that new images are made in. `luks` is LUKS of version 1 then. */
export type TargetFormat = 'qcow2' | 'raw' | 'qcow' | 'luks' | 'vdi' | 'vpc' | 'parallels' | 'vhdx' | 'vmdk'

/** The formats that streams are made in: `vpc` is a fixed VHD then, `vmdk` streamOptimized. */
export type StreamedFormat = 'qcow2' | 'raw' | 'vpc' | 'vmdk'

/** Compressed files, by the names of their tools: what they hold is a raw disk, which `convert` reads front to back. */
export type StreamFormat = 'gzip' | 'xz' | 'zstd'

/** Formats that are recognised, and opened by nothing (but a {@link StreamFormat} by `convert`). */
export type KnownFormat = 'bochs' | 'cloop' | 'dmg' | 'qed' | StreamFormat

/** Every format of the table. */
export type FormatName = Format | KnownFormat

/** One format. */
interface Row {
  readonly marks: Marks
  /** Of those that are opened. */
  readonly image?: Traits
  /** Of the others, and of one that is known by a footer: what is raw to a reader can be one. */
  readonly virtualSize?: SizeReader
}

/** The table has a row for each name of the types above, and no other: the documentation shows those. */
type Table = {
  readonly [N in Exclude<Format, TargetFormat>]: Row & { readonly image: Traits & { readonly create?: never } }
} & {
  readonly [N in TargetFormat]: Row & { readonly image: Traits & { readonly create: Creation } }
} & {
  readonly [N in Exclude<KnownFormat, StreamFormat>]: Row & { readonly image?: never; readonly virtualSize: SizeReader }
} & {
  readonly [N in StreamFormat]: Row & { readonly image?: never; readonly stream: true }
}

const QCOW = ascii('QFI\xfb')
const QCOW_VERSION_1 = ascii('QFI\xfb\0\0\0\x01')

/** Those that are opened first, in the order in which messages name them. */
const FORMATS: Table & Readonly<Record<FormatName, Row>> = {
  qcow2: {
    // Version 1 is another format of the same magic; an unknown version is this one's to refuse.
    marks: { matches: head => startsWith(head, QCOW) && !startsWith(head, QCOW_VERSION_1) },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: true,
      requestAlignment: 1,
      can: ['write', 'compress', 'snapshots', 'bitmaps', 'check', 'compact', 'amend', 'keys', 'commit', 'rebase'],
      create: {
        shape: [
          'version',
          'clusterSize',
          'extendedL2',
          'compressionType',
          'preallocation',
          'refcountBits',
          'lazyRefcounts',
          'backingFile',
          'backingFormat',
          'dataFile',
          'dataFileRaw',
          'keepDataFile',
          'encrypt',
        ],
        preallocation: ['off', 'metadata', 'falloc', 'full'],
        streamed: true,
      },
    },
  },
  raw: {
    marks: {},
    image: {
      probed: false,
      plain: true,
      aliases: ['file', 'host_device'],
      backingFile: false,
      requestAlignment: 1,
      can: ['write'],
      create: { shape: ['preallocation'], preallocation: ['off', 'falloc', 'full'], streamed: true },
    },
  },
  qcow: {
    marks: { magics: [{ bytes: QCOW_VERSION_1 }] },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: true,
      requestAlignment: 512,
      can: [],
      create: { shape: ['backingFile', 'backingFormat'], preallocation: [], compressed: true },
    },
  },
  luks: {
    marks: { magics: [{ bytes: ascii('LUKS\xba\xbe') }] },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: false,
      requestAlignment: 512,
      can: ['write', 'keys'],
      create: {
        shape: ['preallocation', 'encrypt'],
        preallocation: ['off', 'metadata', 'falloc', 'full'],
        needs: 'encrypt',
      },
    },
  },
  vdi: {
    marks: { magics: [{ bytes: Buffer.from([0x7f, 0x10, 0xda, 0xbe]), offset: 0x40 }] },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: true,
      requestAlignment: 512,
      can: ['write', 'check'],
      create: {
        shape: ['preset', 'preallocation', 'static', 'backingFile', 'backingFormat'],
        preallocation: ['off', 'metadata', 'falloc', 'full'],
        presets: ['virtualbox'],
        backingFormat: 'vdi',
        namelessBacking: true,
      },
    },
  },
  vpc: {
    marks: { magics: [{ bytes: ascii('conectix') }], footer: { bytes: ascii('conectix'), length: 512 } },
    image: {
      probed: true,
      plain: false,
      aliases: ['vhd'],
      words: ['vhd'],
      backingFile: true,
      requestAlignment: 512,
      can: ['write', 'check'],
      create: {
        shape: ['preset', 'preallocation', 'subformat', 'forceSize', 'backingFile', 'backingFormat'],
        preallocation: ['off', 'metadata', 'falloc', 'full'],
        presets: ['azure', 'xenserver'],
        subformats: ['dynamic', 'fixed'],
        streamed: 'fixed',
        backingFormat: 'vpc',
        datesBacking: true,
      },
    },
    virtualSize: vpcSize,
  },
  parallels: {
    marks: {
      magics: [{ bytes: ascii('WithoutFreeSpace') }, { bytes: ascii('WithouFreSpacExt') }],
      matches: isParallelsDescriptor,
    },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: false,
      requestAlignment: 512,
      silent: true,
      can: ['write', 'check'],
      create: { shape: ['preallocation', 'clusterSize'], preallocation: ['off'] },
    },
  },
  vhdx: {
    marks: { magics: [{ bytes: ascii('vhdxfile') }] },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: true,
      requestAlignment: 512,
      can: ['write', 'check'],
      create: {
        shape: [
          'preset',
          'subformat',
          'blockSize',
          'logSize',
          'blockStateZero',
          'logicalSectorSize',
          'preallocation',
          'backingFile',
          'backingFormat',
        ],
        preallocation: ['off'],
        backingFormat: 'vhdx',
        presets: ['hyper-v'],
        subformats: ['dynamic', 'fixed'],
      },
    },
  },
  vmdk: {
    marks: { magics: [{ bytes: ascii('KDMV') }, { bytes: ascii('COWD') }], matches: isVmdkDescriptor },
    image: {
      probed: true,
      plain: false,
      aliases: [],
      backingFile: true,
      requestAlignment: 1,
      can: ['write', 'check'],
      create: {
        shape: [
          'preset',
          'subformat',
          'adapterType',
          'hardwareVersion',
          'toolsVersion',
          'compat6',
          'zeroedGrain',
          'backingFile',
          'backingFormat',
        ],
        preallocation: [],
        compressed: true,
        presets: ['esxi', 'ovf'],
        subformats: [
          'monolithicSparse',
          'monolithicFlat',
          'twoGbMaxExtentSparse',
          'twoGbMaxExtentFlat',
          'streamOptimized',
        ],
        streamed: 'streamOptimized',
        backingFormat: 'vmdk',
      },
    },
  },
  bochs: { marks: { magics: [{ bytes: ascii('Bochs Virtual HD Image') }] }, virtualSize: bochsSize },
  cloop: { marks: { magics: [{ bytes: ascii('#!/bin/sh\n#V2.0 Format\nmodprobe cloop') }] }, virtualSize: cloopSize },
  dmg: {
    marks: { magics: [{ bytes: ascii('koly') }], footer: { bytes: ascii('koly'), length: 512 } },
    virtualSize: dmgSize,
  },
  qed: { marks: { magics: [{ bytes: ascii('QED\0') }] }, virtualSize: qedSize },
  gzip: { marks: { magics: [{ bytes: Buffer.from([0x1f, 0x8b, 8]) }] }, stream: true },
  xz: { marks: { magics: [{ bytes: ascii('\xfd7zXZ\0') }] }, stream: true },
  zstd: { marks: { magics: [{ bytes: Buffer.from([0x28, 0xb5, 0x2f, 0xfd]) }] }, stream: true },
}

/** A VMDK descriptor is a text file: comments and blank lines, then `version=` 1 to 3. */
function isVmdkDescriptor(head: Buffer): boolean {
  const text = head.toString('latin1')
  return /^#\s*Disk DescriptorFile/i.test(text) || /^(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n/.test(text)
}

/** The descriptor of a bundle, `DiskDescriptor.xml`. */
function isParallelsDescriptor(head: Buffer): boolean {
  const text = head.toString('latin1')
  return /^(?:\xef\xbb\xbf)?\s*<[?!P]/.test(text) && /<Parallels_disk_image[\s>]/.test(text)
}

/** What makes a file one of its format. */
export const ROWS: readonly (readonly [FormatName, Row])[] = Object.entries(FORMATS) as [FormatName, Row][]

/** What is opened where nothing says otherwise, and what new images are unless the caller says so. */
export const DEFAULT_FORMAT: Format & TargetFormat & StreamedFormat = 'qcow2'

/** A file of which nothing else is known: its bytes are the disk. */
export const PLAIN_FORMAT: Format & TargetFormat = 'raw'

/** Whether there is a format of that name, opened or not. */
export const isKnown = (name: string): name is FormatName => Object.hasOwn(FORMATS, name)

/** Whether images are opened in the format. */
export const isFormat = (name: string | undefined): name is Format =>
  name !== undefined && isKnown(name) && 'image' in FORMATS[name]

/** Whether it is a compression whose contents a convert reads. */
export const isStream = (name: string | undefined): name is StreamFormat =>
  name !== undefined && isKnown(name) && 'stream' in FORMATS[name]

/** Whether new images are made in the format. */
export const isTarget = (name: string): name is TargetFormat => isFormat(name) && 'create' in FORMATS[name].image

/** The format whose header can lie in another file than its data. */
export const DETACHABLE_FORMAT: Format = 'luks'

/** Formats that are opened. */
export const SOURCE_FORMATS: readonly Format[] = ROWS.map(([name]) => name).filter(isFormat)

/** Compressed files that a convert reads. */
export const STREAM_FORMATS: readonly StreamFormat[] = ROWS.map(([name]) => name).filter(isStream)

/** Formats that are made. */
export const TARGET_FORMATS: readonly TargetFormat[] = SOURCE_FORMATS.filter(isTarget)

/** How an image of the format is opened, and what it can be. */
export const traitsOf = (format: Format): Traits => FORMATS[format].image

/** What a new image of the format can be made with. */
export const creationOf = (format: TargetFormat): Creation => FORMATS[format].image.create

/** Whether a new image of the format can be a stream. */
export const isStreamed = (format: TargetFormat): format is StreamedFormat => creationOf(format).streamed !== undefined

/** Formats that streams are made in. */
export const STREAMED_FORMATS: readonly StreamedFormat[] = TARGET_FORMATS.filter(isStreamed)

/** Whether the file is the disk. */
export const isPlain = (format: Format): boolean => traitsOf(format).plain

/** Whether a file is of the format by its first bytes alone, which nothing else has. */
export const isKnownByStart = (format: Format): boolean =>
  traitsOf(format).probed && FORMATS[format].marks.footer === undefined

/** Whether a new image of the format can be compressed. */
export const isCompressed = (format: TargetFormat): boolean =>
  can(format, 'compress') || creationOf(format).compressed === true

/** Whether a format has an ability. */
export const can = (format: Format, ability: Ability): boolean => traitsOf(format).can.includes(ability)

/** The format that a word of the command line is. */
export const formatOfWord = (word: string): Format | undefined =>
  SOURCE_FORMATS.find(format => format === word || traitsOf(format).words?.includes(word))

/** The format that is opened under a name which an image has for its backing file's. */
export const formatNamed = (name: string): Format | undefined =>
  SOURCE_FORMATS.find(format => format === name || traitsOf(format).aliases.includes(name))

/** `a, b or c` */
export const listed = (names: readonly string[], word: 'and' | 'or'): string =>
  names.length < 2 ? names.join() : `${names.slice(0, -1).join(', ')} ${word} ${names.at(-1)}`

/** `'a', 'b' or 'c'` */
export const quoted = (names: readonly string[]): string =>
  listed(
    names.map(name => `'${name}'`),
    'or',
  )
