/** One upload: by a single request where it is small, else in parts, which become an object or are given up. */

import type { CompletedPart } from '@aws-sdk/client-s3'
import { Qcow2Error } from '../errors.js'
import { type Progress, throwIfAborted } from '../options.js'
import type { UploadResult } from '../stream-target.js'
import { onAbort } from '../support/signals.js'
import { failed } from './failures.js'
import { Parts } from './parts.js'
import { type S3Object, statusOf } from './s3-object.js'

/** What an upload is told. */
export interface UploadOrder {
  readonly overwrite: boolean
  readonly concurrency: number
  readonly parameters: Readonly<Record<string, unknown>>
  readonly partSize: number
  readonly mostParts: number
  readonly byteLength: number | undefined
  readonly onProgress: ((progress: Progress) => unknown) | undefined
}

/** What was in its place before: an entity tag, nothing, or what may not be looked at. */
type Before = { readonly etag: string | undefined } | undefined

const MIB = 2 ** 20

/** How often parts are given up before that is a failure. */
const GIVE_UPS = 3

/** How many times as long as usual a store may take to put parts together. */
const PATIENCE = 10

export class S3Upload {
  readonly #object: S3Object
  readonly #order: UploadOrder
  readonly #signal: AbortSignal | undefined
  /** Ends what is under way when something has failed. */
  readonly #failing = new AbortController()
  #failure: { readonly error: unknown } | undefined
  #sent = 0
  /** Parts may be left: that is what its caller must know. */
  #left = false

  constructor(object: S3Object, order: UploadOrder, signal: AbortSignal | undefined) {
    this.#object = object
    this.#order = order
    this.#signal = signal
  }

  async run(stream: AsyncIterable<Uint8Array>): Promise<UploadResult> {
    const forget = onAbort(this.#signal, () => this.#failing.abort(this.#signal?.reason))
    const parts = new Parts(stream, this.#order.partSize, this.#failing.signal)
    try {
      throwIfAborted(this.#signal)
      const before = await this.#look()
      const first = await parts.next()
      const result =
        first.length < this.#order.partSize ? await this.#put(first, parts) : await this.#send(first, parts, before)
      return { bytesWritten: parts.taken, ...result }
    } catch (error) {
      parts.destroy(error)
      if (!this.#left) throwIfAborted(this.#signal)
      throw error
    } finally {
      forget()
    }
  }

  /** What is in its place. Who may only write is not told; the store itself refuses in the end. */
  async #look(): Promise<Before> {
    const { sdk, address, name } = this.#object
    const head = new sdk.HeadObjectCommand(address)
    try {
      const found = await this.#object.call('HeadObject', { signal: this.#signal }, (client, options) =>
        client.send(head, options),
      )
      if (this.#order.overwrite) return { etag: found.ETag }
    } catch (error) {
      if (error instanceof Qcow2Error && error.code === 'ENOENT') return { etag: undefined }
      if (error instanceof Qcow2Error && error.code === 'EACCES' && statusOf(error.cause) === 403) return undefined
      throw error
    }
    throw failed('EEXIST', 'the object exists: say overwrite: true', { name, call: 'HeadObject' })
  }

  /** What there is to say on a new object. */
  get #parameters(): Readonly<Record<string, unknown>> {
    return { ...this.#order.parameters, ...this.#object.address }
  }

  /** Nothing may be there, unless it may be replaced. */
  get #condition(): { readonly IfNoneMatch?: string } {
    return this.#order.overwrite ? {} : { IfNoneMatch: '*' }
  }

  /** Milliseconds in which an answer must come that bytes are sent for. */
  #silenceFor(length: number): number {
    return this.#object.patience.silence * (1 + Math.ceil(length / MIB))
  }

  async #put(all: Uint8Array, parts: Parts): Promise<Omit<UploadResult, 'bytesWritten'>> {
    this.#checkEnd(parts.taken)
    const { sdk, address } = this.#object
    const command = new sdk.PutObjectCommand({ ...this.#parameters, ...address, ...this.#condition, Body: all })
    const answer = await this.#object.call(
      'PutObject',
      { signal: this.#signal, silence: this.#silenceFor(all.length), conflict: 'EEXIST' },
      (client, options) => client.send(command, options),
    )
    this.#progress(all.length)
    return toResult(answer)
  }

  /** Sends it in parts. What is not completed is given up. */
  async #send(first: Uint8Array, parts: Parts, before: Before): Promise<Omit<UploadResult, 'bytesWritten'>> {
    const { sdk, address, name } = this.#object
    const command = new sdk.CreateMultipartUploadCommand({ ...this.#parameters, ...address })
    // One whose answer is lost has no parts, which is what costs.
    const { UploadId: id } = await this.#object.call(
      'CreateMultipartUpload',
      { signal: this.#signal },
      (client, options) => client.send(command, options),
    )
    if (id === undefined) {
      throw failed('ERR_QCOW2_IO', 'the store began an upload without an id', { name, call: 'CreateMultipartUpload' })
    }
    try {
      const sent = await this.#sendParts(id, first, parts)
      this.#checkEnd(parts.taken)
      throwIfAborted(this.#signal)
      return await this.#complete(id, sent, parts.taken, before)
    } catch (error) {
      await this.#giveUp(id, error)
      throw error
    }
  }

  /** Sends all parts, several at once, and waits for all of them, also where one fails. */
  async #sendParts(id: string, first: Uint8Array, parts: Parts): Promise<readonly CompletedPart[]> {
    const sent: CompletedPart[] = []
    const running = new Set<Promise<void>>()
    const begin = (part: Uint8Array): void => {
      const number = sent.push({})
      const work = this.#sendPart(id, number, part)
        .then(done => {
          sent[number - 1] = done
          parts.reuse(part)
          this.#progress(part.length)
        })
        .catch((error: unknown) => this.#fail(error))
        .finally(() => running.delete(work))
      running.add(work)
    }
    try {
      for (let part = first; part.length > 0; part = await parts.next()) {
        if (sent.length === this.#order.mostParts) throw this.#tooMany()
        this.#checkLength(parts.taken)
        begin(part)
        if (running.size >= this.#order.concurrency) await Promise.race(running)
        if (this.#failure !== undefined) break
      }
    } catch (error) {
      this.#fail(error)
    }
    await Promise.all(running)
    if (this.#failure !== undefined) throw this.#failure.error
    return sent
  }

  /** Ends what is under way: the first failure is the one to tell. */
  #fail(error: unknown): void {
    this.#failure ??= { error }
    this.#failing.abort(error)
  }

  async #sendPart(id: string, number: number, part: Uint8Array): Promise<CompletedPart> {
    const { sdk, address } = this.#object
    const command = new sdk.UploadPartCommand({ ...address, UploadId: id, PartNumber: number, Body: part })
    const answer = await this.#object.call(
      'UploadPart',
      { signal: this.#failing.signal, silence: this.#silenceFor(part.length) },
      (client, options) => client.send(command, options),
    )
    const { ETag, ChecksumCRC32, ChecksumCRC32C, ChecksumCRC64NVME, ChecksumSHA1, ChecksumSHA256 } = answer
    return {
      PartNumber: number,
      ETag,
      ChecksumCRC32,
      ChecksumCRC32C,
      ChecksumCRC64NVME,
      ChecksumSHA1,
      ChecksumSHA256,
    }
  }

  /** Makes an object of the parts. No signal ends that: it would not be known what became of it. */
  async #complete(
    id: string,
    sent: readonly CompletedPart[],
    length: number,
    before: Before,
  ): Promise<Omit<UploadResult, 'bytesWritten'>> {
    const { sdk, address, patience } = this.#object
    const command = new sdk.CompleteMultipartUploadCommand({
      ...address,
      ...this.#condition,
      UploadId: id,
      MultipartUpload: { Parts: [...sent] },
    })
    try {
      const answer = await this.#object.call(
        'CompleteMultipartUpload',
        { signal: undefined, silence: patience.silence * PATIENCE, conflict: 'EEXIST' },
        (client, options) => client.send(command, options),
      )
      return toResult(answer)
    } catch (error) {
      // The answer may have been lost, and the upload be gone because it became the object.
      const found = await this.#completed(length, before).catch(() => undefined)
      if (found === undefined) throw error
      return found
    }
  }

  /** The object, if it is the one that these parts became. */
  async #completed(length: number, before: Before): Promise<Omit<UploadResult, 'bytesWritten'> | undefined> {
    const { sdk, address } = this.#object
    const head = new sdk.HeadObjectCommand(address)
    const found = await this.#object.call('HeadObject', { signal: undefined }, (client, options) =>
      client.send(head, options),
    )
    const fresh = before !== undefined && found.ETag !== undefined && found.ETag !== before.etag
    return fresh && found.ContentLength === length ? toResult(found) : undefined
  }

  /** Gives the parts up, until the store has none. Nothing is under way any more. */
  async #giveUp(id: string, because: unknown): Promise<void> {
    const { sdk, address } = this.#object
    const upload = { ...address, UploadId: id }
    let failure: unknown
    for (let tries = 0; tries < GIVE_UPS; tries++) {
      try {
        await this.#object.call('AbortMultipartUpload', { signal: undefined }, (client, options) =>
          client.send(new sdk.AbortMultipartUploadCommand(upload), options),
        )
        // A part that was on its way may have come behind that.
        const left = await this.#object.call('ListParts', { signal: undefined }, (client, options) =>
          client.send(new sdk.ListPartsCommand(upload), options),
        )
        if ((left.Parts ?? []).length === 0) return
        failure = undefined
      } catch (error) {
        // There is no such upload, or who may write may not look.
        if (error instanceof Qcow2Error && (error.code === 'ENOENT' || error.syscall === 'ListParts')) return
        failure = error
      }
    }
    this.#left = true
    throw this.#mayBeLeft(id, because, failure)
  }

  #mayBeLeft(id: string, because: unknown, failure: unknown): Qcow2Error {
    const reason = because instanceof Error ? because.message : String(because)
    const message = `parts of an upload may be left, which cost: abort the upload ${id} of ${this.#object.name}. It failed: ${reason}`
    const cause = failure === undefined ? because : new AggregateError([because, failure], reason)
    return new Qcow2Error('ERR_QCOW2_IO', message, { path: this.#object.name, syscall: 'AbortMultipartUpload', cause })
  }

  /** No more bytes may come than were announced. */
  #checkLength(taken: number): void {
    const { byteLength } = this.#order
    if (byteLength !== undefined && taken > byteLength) throw this.#wrongLength('has more bytes')
  }

  /** And no fewer. */
  #checkEnd(taken: number): void {
    this.#checkLength(taken)
    const { byteLength } = this.#order
    if (byteLength !== undefined && taken < byteLength) throw this.#wrongLength(`ended after ${taken} bytes`)
  }

  #wrongLength(how: string): Qcow2Error {
    const place = { name: this.#object.name, call: 'upload' }
    return failed('ERR_QCOW2_IO', `the stream ${how}, and was to have ${this.#order.byteLength}`, place)
  }

  #tooMany(): Qcow2Error {
    const { mostParts, partSize } = this.#order
    const message = `${this.#object.name}: the stream has more than ${mostParts} parts of ${partSize} bytes: say byteLength, or a larger partSize`
    return new Qcow2Error('ERR_QCOW2_LIMIT', message, { path: this.#object.name, field: 'partSize' })
  }

  /** What `onProgress` throws, or what it returns rejects with, ends the upload. */
  #progress(length: number): void {
    this.#sent += length
    const { onProgress, byteLength } = this.#order
    const told = onProgress?.({ phase: 'upload', current: this.#sent, total: byteLength ?? 0, steps: [this.#sent] })
    Promise.resolve(told).catch((error: unknown) => this.#fail(error))
  }
}

const toResult = ({
  ETag,
  VersionId,
}: {
  readonly ETag?: string | undefined
  readonly VersionId?: string | undefined
}): Omit<UploadResult, 'bytesWritten'> => ({
  ...(ETag !== undefined && { etag: ETag }),
  ...(VersionId !== undefined && { versionId: VersionId }),
})
